"""Precision, norms and finiteness, for all of the package.

Sums, norms and states are kept in float32 at least: in float64 for float64, in float32 for
everything else. (`keras.backend.result_type("float64", "float32")` does not say so: it is
float32 on PyTorch and JAX. By it the operations of Keras that take two tensors give float32
there, such as `ops.minimum` and `ops.matmul`, and so do its layers and means of losses; `*`,
`@` and `ops.where` do not.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

# Logarithm of 0, or the score of what is masked. Finite, so that differences of two are no NaN,
# nor a softmax of which all is masked. For float32 at least.
LOG_ZERO = -1e30


def at_least_float32(dtype: Any) -> str:
    """The dtype to compute in: "float64" for float64, otherwise "float32"."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def cast_up(tensor: Any) -> Any:
    """The tensor in float32 at least."""
    return ops.cast(tensor, at_least_float32(tensor.dtype))


def all_finite(tensors: Sequence) -> Any:
    """Whether no element of any tensor is infinite or NaN, as a boolean tensor."""
    if not tensors:
        return ops.convert_to_tensor(True)
    return ops.all(ops.stack([ops.all(ops.isfinite(t)) for t in tensors]))


def norm(x: Any, axis: Any = None) -> Any:
    """The Euclidean norm; over given axes these are kept. The gradient at 0 is NaN."""
    return ops.sqrt(ops.sum(ops.square(x), axis=axis, keepdims=axis is not None))


def scaled_norm(x: Any, axis: Any = None) -> Any:
    """`norm` in units of the largest element, so that no square overflows or vanishes."""
    largest = ops.max(ops.abs(x), axis=axis, keepdims=axis is not None)
    unit = ops.where(largest > 0, largest, ops.ones_like(largest))
    return unit * norm(x / unit, axis)


def rms(x: Any, axis: Any = None) -> Any:
    """The root of the mean square; over given axes these are kept."""
    return ops.sqrt(ops.mean(ops.square(x), axis=axis, keepdims=axis is not None))


def direction(x: Any) -> Any:
    """Vectors x / ||x|| on the last axis, 0 where x is. The gradient is finite everywhere."""
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-24))


def guarded(fn: Callable[[Any], Any], x: Any) -> Any:
    """fn(x) where x > 0; elsewhere 0, as is the gradient, where that of fn is no number."""
    positive = x > 0
    return ops.where(positive, fn(ops.where(positive, x, 1)), 0)
