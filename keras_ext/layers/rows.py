"""Apply a layer to all tokens of all texts as to the rows of one matrix."""

import math
from typing import Any

import keras
from keras import ops


def by_rows(
    layer: keras.layers.Layer, x: Any, joined: int = 1, split: tuple[int, ...] | None = None
) -> Any:
    """`layer(x)` of a layer that treats all but the last axis alike, such as a Dense.

    JAX makes the gradient of a kernel from a tensor of three axes with a transposition that
    takes as long as the product itself; from a matrix, without. TensorFlow multiplies matrices
    in either case. A layer with an activity regulariser, which Keras divides by the first
    axis, gets the tensor as it is.

    Args:
        x: (..., width), or (..., heads, size).
        joined: number of last axes of `x` that are one to the layer. Default: 1.
        split: sizes of the axes that the units become. Default: they stay one.

    Returns: (..., units), or (..., *split).

    Example:
        >>> x = keras.ops.ones((4, 5, 2))
        >>> by_rows(keras.layers.Dense(3), x).shape == (4, 5, 3)
        True
        >>> by_rows(keras.layers.Dense(6), x, split=(3, 2)).shape == (4, 5, 3, 2)
        True
    """
    # Each side is reshaped once: where another number of axes follows, tf2onnx drops the first
    # of two reshapes, and takes the shape of what is before it.
    leading, width = ops.shape(x)[:-joined], math.prod(x.shape[-joined:])
    as_it_is = layer.activity_regularizer is not None
    y = layer(ops.reshape(x, (*(leading if as_it_is else (-1,)), width)))
    return ops.reshape(y, (*leading, *(split or (y.shape[-1],))))
