"""Positions for attention: what they are to a `MultiHeadAttention`, and the rotary ones.

A position tells an attention how scores and outputs depend on where tokens stand. `Position`
is the one that tells nothing (NoPE), and what the others override. Those with weights are
layers too: `RelativePosition` and `T5Bias`.

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

from keras_ext.numerics import at_least_float32, cast_up


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
    wide = at_least_float32(dtype)
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


def given_positions(positions: Any, position: "Position | None", *tokens: Any) -> Any:
    """The call argument `positions` of an attention, checked.

    Args:
        positions: integers (batch, length), where the tokens stand.
        position: of the attention, which must have one.
        tokens: targets and sources, (batch, length, ...).

    Returns: int32 (batch, length).
    """
    if position is None:
        raise ValueError(
            "positions have no effect on an attention without a position: give it one, such as "
            "position=RotaryPosition(), or leave them out."
        )
    positions = ops.convert_to_tensor(positions)
    dtype, shape = keras.backend.standardize_dtype(positions.dtype), tuple(positions.shape)
    if "int" not in dtype:
        raise ValueError(f"positions must be integers, got {dtype}: cast them.")
    for x in tokens:
        sizes = zip(shape, x.shape[:2], strict=False)
        if len(shape) != 2 or any(None not in pair and pair[0] != pair[1] for pair in sizes):
            raise ValueError(
                "positions must be those of self-attention, of the shape (batch, length) = "
                f"{tuple(x.shape[:2])}, got {shape}."
            )
    return ops.cast(positions, "int32")  # unsigned ones have no negative distances


class Position:
    """No positions; the base class of all others.

    All that matters is how far tokens stand from each other: adding a number to all positions
    changes nothing. So windows count them within a block, and padding may be on the left.
    """

    only_encodes = True  # False where `scores` or `outputs` do more
    needs_causal = False  # True where later tokens have no position
    key_dim_multiple = 1  # that key_dim has to be a multiple of

    def in_training(self) -> "Position":
        """The position while the model is trained."""
        return self

    def encode(self, x: Any, positions: Any) -> Any:
        """Queries or keys (batch, length, heads, size) as they enter `scores`, and a cache.

        Positions are ([batch,] length).
        """
        return x

    def scores(self, query: Any, key: Any, query_positions: Any, key_positions: Any) -> Any:
        """Scores (batch, heads, targets, sources), in float32 at least.

        Args:
            query: encoded and scaled, (batch, targets, heads, size).
            key: encoded, (batch, sources, heads, size).
            query_positions: ([batch,] targets).
            key_positions: ([batch,] sources).
        """
        scores = ops.einsum("bthd,bshd->bhts", query, key)
        return cast_up(scores)

    def outputs(
        self, weights: Any, value: Any, query_positions: Any, key_positions: Any
    ) -> Any:
        """Weights (batch, heads, targets, sources) of the values (batch, sources, ...)."""
        return ops.einsum("bhts,bshd->bthd", weights, value)


@keras.saving.register_keras_serializable(package="keras_ext")
class RotaryPosition(Position):
    """Rotary positions: the score of a query at i and a key at j is q_iᵀ R(j - i) k_j.

    Args:
        base: of the wavelengths. Default: 10,000.
        interleaved: which components make a pair; see `rotary_embedding`. Default: True.

    Example:
        >>> attention = MultiHeadAttention(4, 8, position=RotaryPosition(interleaved=False))

    Reference: Su et al. 2021, arXiv 2104.09864; kexue.fm/archives/8265.
    """

    key_dim_multiple = 2

    def __init__(self, base: float = 10_000.0, interleaved: bool = True) -> None:
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}.")
        self.base = base
        self.interleaved = interleaved

    def turn(self, x: Any, positions: Any) -> Any:
        return rotary_embedding(x, positions, self.base, self.interleaved)

    def encode(self, x: Any, positions: Any) -> Any:
        return self.turn(x, positions)

    def get_config(self) -> dict[str, Any]:
        return {"base": self.base, "interleaved": self.interleaved}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RotaryPosition":
        return cls(**config)
