"""The slope of a critic at each example, for its penalty and its normalisation."""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.every import every_layer
from keras_ext.numerics import cast_up


def scores_and_slopes(critic: Any, inputs: Any, training: bool = False) -> tuple[Any, Any]:
    """D(x) and ||dD/dx|| per example, both of the shape of D(x) and differentiable."""

    def total(inputs):  # the sum: each score depends on its own example only
        scores = critic(inputs, training=training)
        return ops.sum(scores), scores

    (_, scores), gradient = backend.value_and_grad(total, has_aux=True)(inputs)
    squares = ops.square(cast_up(gradient))
    # Inside the root: its gradient at 0 is infinite.
    norms = ops.sqrt(ops.sum(squares, axis=tuple(range(1, len(squares.shape)))) + 1e-12)
    return scores, ops.cast(ops.reshape(norms, ops.shape(scores)), scores.dtype)


def refuse_batch_normalization(critic: Any, who: str) -> None:
    """A score must depend on its own example only."""
    for layer in every_layer(critic):
        if isinstance(layer, keras.layers.BatchNormalization):
            raise ValueError(
                f"{who} needs the gradient of each score to its own example, but {layer.name} "
                "normalises over the batch. Use LayerNormalization or GroupNormalization."
            )
