"""Virtual adversarial training: predictions are to withstand the worst small shift.

With the predictions p(E) at embeddings E:

    L + λ KL(p || p(E + r)),    r = ε g / ||g||,    g = d/du KL(p || p(E + ξ u)),    ||u|| = 1

at a random u. No gradient flows through p and r. The divergence is quadratic around E, so that
g is the product of its Hessian with ξ u: one step of a power iteration towards the direction
that changes the predictions most. The second term needs no labels.

All passes have the draws of the first one, and norms are over the whole batch.

Cost: one more pass forward and backward for g, another for the divergence: about three steps.

Source: Miyato et al. 2018, arXiv 1704.03976; kexue.fm/archives/7466.
"""

from typing import Any, Literal

import keras
from keras import ops

from keras_ext import backend
from keras_ext.arguments import number
from keras_ext.numerics import at_least_float32
from keras_ext.training.divergence import check_predictions, mean_divergence
from keras_ext.training.on_layer import OnLayer, to_length
from keras_ext.training.step import SCALE, Inner, Step


@keras.saving.register_keras_serializable(package="keras_ext")
class VAT(OnLayer):
    """The loss, and the divergence of predictions under the worst small shift.

        L + λ KL(p(E) || p(E + r)),    ||r|| = ε

    Args:
        layer: the name of the embedding layer.
        epsilon: ε > 0, the length of the shift over the whole batch. Default: 1.
        xi: ξ > 0, the length of the random shift at which the direction is sought. Default: 10,
            that of the article.
        weight: λ > 0. Default: 1.
        on: E is the "matrix" of the layer, or its "output". Default: "matrix".
        from_logits: whether the model returns logits, not probabilities. Default: False.
        seed: of the random shifts, an integer. Default: None, a random one.

    Raises:
        ValueError: an argument is out of range; in `with_objective`, the model has no such
            layer, the layer no matrix, or the model several outputs or a single probability;
            in training, as for `RDrop`.

    Example:
        >>> objective = VAT("token_embedding", epsilon=1.0)

    Reference: Miyato et al. 2018, arXiv 1704.03976; kexue.fm/archives/7466.
    """

    def __init__(
        self,
        layer: str,
        epsilon: float = 1.0,
        xi: float = 10.0,
        weight: float = 1.0,
        on: Literal["matrix", "output"] = "matrix",
        from_logits: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(layer, on)
        self.epsilon = number("epsilon", epsilon, "(0, inf)")
        self.xi = number("xi", xi, "(0, inf)")
        self.weight = number("weight", weight, "(0, inf)")
        self.from_logits = bool(from_logits)
        self.seed = seed
        self.seed_generators = (keras.random.SeedGenerator(seed),)

    def check(self, model: keras.Model) -> None:
        super().check(model)
        check_predictions("VAT", model, self.from_logits)

    def loss(self, inner: Inner, step: Step) -> tuple[Any, Any]:
        loss, y_pred = inner()
        target, clean = self.target(step), ops.stop_gradient(y_pred)

        def divergence(shift: Any) -> Any:
            with step.shifted(target, shift):
                shifted = step.predict()
            return mean_divergence(clean, shifted, step.batch.sample_weight, self.from_logits)

        u = to_length(keras.tree.map_structure(self._normal, step.value(target)), self.xi)
        scaled = backend.value_and_grad(lambda u: SCALE * divergence(u), constant=True)
        shift = to_length(scaled(u)[1], self.epsilon)
        return loss + ops.cast(self.weight * divergence(shift), loss.dtype), y_pred

    def _normal(self, like: Any) -> Any:
        dtype = at_least_float32(like.dtype)
        return keras.random.normal(ops.shape(like), dtype=dtype, seed=self.seed_generators[0])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "epsilon": self.epsilon,
            "xi": self.xi,
            "weight": self.weight,
            "from_logits": self.from_logits,
            "seed": self.seed,
        }
