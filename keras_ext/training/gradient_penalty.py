"""Gradient penalty on embeddings.

    L + λ/2 ||g||²,    g = dL/dE

over all of the batch, of the mean loss. The gradient of the penalty is that of adversarial
training with the shift λ g, to first order.

Cost: one more pass, forward and backward, and the derivative of that: about three steps.

Source: kexue.fm/archives/7234.
"""

from typing import Any, Literal

import keras
from keras import ops

from keras_ext.arguments import number
from keras_ext.training.on_layer import OnLayer
from keras_ext.training.step import Inner, Step


@keras.saving.register_keras_serializable(package="keras_ext")
class GradientPenalty(OnLayer):
    """A penalty on the slope of the loss at the embeddings.

        L + λ/2 ||dL/dE||²

    For the critic of a GAN, see `CriticPenalty`.

    Args:
        layer: the name of the embedding layer.
        weight: λ > 0. Default: 1.
        on: E is the "matrix" of the layer, or its "output", where repeated tokens count one
            by one. Default: "matrix".

    Raises:
        ValueError: an argument is out of range; in `with_objective`, the model has no such
            layer, or the layer no matrix.

    Example:
        >>> objective = GradientPenalty("token_embedding")

    Reference: kexue.fm/archives/7234.
    """

    def __init__(
        self, layer: str, weight: float = 1.0, on: Literal["matrix", "output"] = "matrix"
    ) -> None:
        super().__init__(layer, on)
        self.weight = number("weight", weight, "(0, inf)")

    def loss(self, inner: Inner, step: Step) -> tuple[Any, Any]:
        loss, y_pred = inner()
        _, gradient = step.value_and_grad(inner, self.target(step))
        squares = sum(ops.sum(ops.square(g)) for g in keras.tree.flatten(gradient))
        return loss + ops.cast(self.weight / 2 * squares, loss.dtype), y_pred

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"weight": self.weight}
