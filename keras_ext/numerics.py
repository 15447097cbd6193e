"""Precision and finiteness, for all of the package.

Sums, norms and states are kept in float32 at least: in float64 for float64, in float32 for
everything else. (`keras.backend.result_type("float64", "float32")` does not say so: it is
float32 on PyTorch and JAX. By it the operations of Keras that take two tensors give float32
there, such as `ops.minimum` and `ops.matmul`, and so do its layers and means of losses; `*`,
`@` and `ops.where` do not.)
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


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
