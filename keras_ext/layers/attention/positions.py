"""Positions for attention.

Rotary positions (RoPE) turn each pair (u, v) of a query's and a key's components by an angle
that grows with the position t:

    (u, v) -> (u cos tθ_k - v sin tθ_k, v cos tθ_k + u sin tθ_k),    θ_k = base^(-2k/size)

so that the product of a query at i and a key at j depends on where they stand only by j - i.

Exact; no weights, O(length · size) time. Angles are computed in float32 at least, also for
bfloat16, in which the positions 256 and 257 are the same.

Source: Su et al. 2021 (RoFormer), arXiv 2104.09864; kexue.fm/archives/8265.
"""

from typing import Any

import keras
import numpy as np
from keras import ops


def rotary_embedding(
    x: Any, positions: Any = None, base: float = 10_000.0, interleaved: bool = True
) -> Any:
    """Turn queries or keys by the angles of their positions.

    Args:
        x: (batch, length, ..., size), with an even size; heads stand between.
        positions: (length,) or (batch, length). Default: 0 ... length - 1.
        base: of the wavelengths, which go from 2π to nearly 2π · base. Default: 10,000.
        interleaved: True pairs the components 2k and 2k + 1 (RoFormer, bert4keras), False
            pairs k and k + size/2 (Llama, Hugging Face). Default: True.

    Returns: like `x`.

    Raises:
        ValueError: the size is odd.

    Example:
        >>> turned = rotary_embedding(np.array([[[1.0, 0.0], [1.0, 0.0]]]))
        >>> [round(float(component), 4) for component in turned[0, 1]]  # cos 1, sin 1
        [0.5403, 0.8415]
    """
    x = ops.convert_to_tensor(x)
    dtype, size = keras.backend.standardize_dtype(x.dtype), x.shape[-1]
    if size % 2:
        raise ValueError(f"The last axis of x must be even, got shape {tuple(x.shape)}.")
    wide = keras.backend.result_type(dtype, "float32")
    if positions is None:
        positions = ops.arange(ops.shape(x)[1])
    frequencies = ops.convert_to_tensor(float(base) ** (-np.arange(0, size, 2) / size), wide)
    angles = ops.expand_dims(ops.cast(positions, wide), -1) * frequencies
    for _ in range(len(x.shape) - 3):
        angles = ops.expand_dims(angles, -2)  # ([batch,] length, 1, size / 2)
    cos, sin = ops.cos(angles), ops.sin(angles)

    shape, axis = ops.shape(x), -1 if interleaved else -2  # of the two in a pair
    split = (size // 2, 2) if interleaved else (2, size // 2)
    u, v = ops.unstack(ops.reshape(ops.cast(x, wide), (*shape[:-1], *split)), 2, axis)
    turned = ops.stack([u * cos - v * sin, v * cos + u * sin], axis)
    return ops.cast(ops.reshape(turned, shape), dtype)
