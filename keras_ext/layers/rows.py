"""Apply a layer to all tokens of all texts as to the rows of one matrix."""

from typing import Any

import keras
from keras import ops


def by_rows(layer: keras.layers.Layer, x: Any) -> Any:
    """`layer(x)` of a layer that treats all but the last axis alike, such as a Dense.

    JAX makes the gradient of a kernel from a tensor of three axes with a transposition that
    takes as long as the product itself; from a matrix, without. TensorFlow multiplies matrices
    in either case. A layer with an activity regulariser, which Keras divides by the first
    axis, gets the tensor as it is.

    Args:
        x: (..., width).

    Returns: (..., units).

    Example:
        >>> by_rows(keras.layers.Dense(3), keras.ops.ones((4, 5, 2))).shape == (4, 5, 3)
        True
    """
    if layer.activity_regularizer is not None:
        return layer(x)
    y = layer(ops.reshape(x, (-1, x.shape[-1])))
    return ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))
