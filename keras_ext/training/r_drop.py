"""R-Drop: two passes with different dropout are to agree.

With the predictions p, q of two passes over the same batch and their losses:

    (L(p) + L(q)) / 2 + α/4 E[KL(p || q) + KL(q || p)]

Dropout trains the mean over many networks, and inference uses one, of the mean weights: the
divergence keeps them close. Without dropout it is 0.

The official code doubles the batch, rows 2i and 2i + 1; here are two passes, so that sample
weights, masks and batch statistics are those of the batch. α is that of the article and the
official code; α/2 in the formula of the paper, α KL/2 beside L(p) + L(q), counts the same.

Source: Liang et al. 2021, arXiv 2106.14448; kexue.fm/archives/8496.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.arguments import number
from keras_ext.training.divergence import check_predictions, mean_divergence
from keras_ext.training.objective import Objective
from keras_ext.training.step import Inner, Step


@keras.saving.register_keras_serializable(package="keras_ext")
class RDrop(Objective):
    """The mean loss of two passes, and the divergence between their predictions.

        (L(p) + L(q)) / 2 + α/4 E[KL(p || q) + KL(q || p)]

    `fit` reports the mean of the divergences, E[KL(p || q) + KL(q || p)] / 2, as `divergence`.

    Args:
        alpha: α > 0. Default: 4.
        from_logits: whether the model returns logits, not probabilities. Default: False.

    Raises:
        ValueError: `alpha` is out of range; in `with_objective`, the model has several outputs
            or a single probability; in training, the loss has another `from_logits`, or
            predictions that are no probabilities (compiled, the loss is NaN then).

    Example:
        >>> objective = RDrop(alpha=4.0)

    Reference: Liang et al. 2021, arXiv 2106.14448; kexue.fm/archives/8496.
    """

    def __init__(self, alpha: float = 4.0, from_logits: bool = False) -> None:
        self.alpha = number("alpha", alpha, "(0, inf)")
        self.from_logits = bool(from_logits)
        self.divergence = keras.metrics.Mean(name="divergence")
        self.metrics = (self.divergence,)

    def check(self, model: keras.Model) -> None:
        check_predictions("RDrop", model, self.from_logits)

    def loss(self, inner: Inner, step: Step) -> tuple[Any, Any]:
        (loss_p, p), (loss_q, q) = inner(), inner()
        weights = step.batch.sample_weight
        pairs = mean_divergence(p, q, weights, self.from_logits) + mean_divergence(
            q, p, weights, self.from_logits
        )
        self.divergence.update_state(pairs / 2)
        return (loss_p + loss_q) / 2 + ops.cast(self.alpha / 4 * pairs, loss_p.dtype), p

    def get_config(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "from_logits": self.from_logits}
