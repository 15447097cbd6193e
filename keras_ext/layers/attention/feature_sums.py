"""Attention by products of features: linear in the length of the texts.

    o_i = Σ_j φ(q_i)ᵀφ(k_j) v_j / Σ_j φ(q_i)ᵀφ(k_j) = φ(q_i)ᵀ S / φ(q_i)ᵀ z
    S = Σ_j φ(k_j) v_jᵀ,    z = Σ_j φ(k_j)

In causal attention the sums go over j <= i. Token by token they are a state that grows by one
outer product; all at once they are taken over chunks of C tokens, with n/C states instead of n:

    o_i = φ(q_i)ᵀ S_before + Σ φ(q_i)ᵀφ(k_j) v_j,    j <= i within the chunk

Exact, whatever the chunk: it only decides what is computed as a square and what as a sum. Costs
2 n m d multiplications per head for m features and d components of a value, and n C (m + d)
more where causal; memory n (m + d + C) + n m d / C. Sums run in float32 at least.

Source: Katharopoulos et al. 2020, arXiv 2006.16236; kexue.fm/archives/7546.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext.layers.attention.projected import ProjectedAttention


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    causal: bool = False,
    chunk_size: int = 128,
) -> Any:
    """Means of the values, weighed by the products of features.

    Args:
        query: φ(q), (batch, targets, heads, features), not negative.
        key: φ(k), (batch, sources, heads, features), not negative.
        value: (batch, sources, heads, value_dim).
        mask: boolean (batch, sources), True = attend. Default: None, all.
        causal: the i-th query sees the first i keys only; as many targets as sources.
        chunk_size: C, for causal attention. Default: 128.

    Returns:
        (batch, targets, heads, value_dim) in the dtype of `value`; zeros where all weights are.

    Raises:
        ValueError: `causal`, and there are not as many targets as sources.

    Example:
        >>> q = k = keras.random.uniform((2, 5, 4, 8))
        >>> tuple(linear_attention(q, k, keras.random.normal((2, 5, 4, 6)), causal=True).shape)
        (2, 5, 4, 6)
    """
    dtype, value_dim = value.dtype, value.shape[-1]
    wide = keras.backend.result_type(dtype, "float32")
    query, key, value = (ops.cast(x, wide) for x in (query, key, value))
    if mask is not None:
        mask = ops.cast(mask, "bool")[:, :, None, None]
        key = ops.where(mask, key, ops.zeros_like(key))
        value = ops.where(mask, value, ops.zeros_like(value))  # they may be anything there
    value = with_one(value)
    if causal:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"Causal linear attention needs as many targets as sources, got "
                f"{query.shape[1]} and {key.shape[1]}."
            )
        sums = _causal_sums(query, key, value, chunk_size)
    else:
        states = ops.einsum("bshm,bshv->bhmv", key, value)
        sums = ops.einsum("bthm,bhmv->bthv", query, states)
    return ops.cast(quotient(sums, value_dim), dtype)


def with_one(value: Any) -> Any:
    """Values with a component 1, whose weighted sum is the normaliser."""
    return ops.concatenate([value, ops.ones_like(value[..., :1])], -1)


def quotient(sums: Any, value_dim: int) -> Any:
    total = sums[..., value_dim:]
    nothing = ops.equal(total, 0)
    return ops.where(nothing, 0.0, sums[..., :value_dim] / ops.where(nothing, 1.0, total))


def _causal_sums(query: Any, key: Any, value: Any, chunk_size: int) -> Any:
    """Σ_(j <= i) φ(q_i)ᵀφ(k_j) v_j: (batch, length, heads, value_dim)."""
    length = ops.shape(query)[1]
    number = -(-length // chunk_size)
    query, key, value = (
        _chunks(x, number, number * chunk_size - length) for x in (query, key, value)
    )  # (batch, heads, number, chunk, ...)
    states = ops.einsum("bhcsm,bhcsv->bhcmv", key, value)
    before = ops.cumsum(states, axis=2)[:, :, :-1]
    before = ops.concatenate([ops.zeros_like(states[:, :, :1]), before], axis=2)
    weights = ops.einsum("bhctm,bhcsm->bhcts", query, key)
    order = np.tri(chunk_size, dtype=bool)
    weights = ops.where(order, weights, ops.zeros_like(weights))
    sums = ops.einsum("bhctm,bhcmv->bhctv", query, before) + ops.matmul(weights, value)
    heads, width = sums.shape[1], sums.shape[-1]
    sums = ops.reshape(sums, (-1, heads, number * chunk_size, width))
    return ops.transpose(sums, (0, 2, 1, 3))[:, :length]


def _chunks(x: Any, number: Any, missing: Any) -> Any:
    """(batch, length, heads, size) -> (batch, heads, number, chunk, size), zeros at the end."""
    heads, size = x.shape[2:]
    x = ops.transpose(ops.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]), (0, 2, 1, 3))
    return ops.reshape(x, (ops.shape(x)[0], heads, number, -1, size))


class FeatureAttention(ProjectedAttention):
    """Base class: attention by products of features, in linear time.

    A subclass defines `features(query, key, mask)`, which gives φ(q) and φ(k) and what it took
    out of φ(k) against overflow: the logarithm of a factor common to all keys of a text and
    head, (batch, 1, heads, 1), or None. It cancels, but steps must know it. `num_features` is
    the last axis of both.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        causal: bool = False,
        chunk_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, num_kv_heads, causal, **kwargs)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
        self.chunk_size = chunk_size

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        source_mask: Any,
        attention_mask: Any,
        attention_bias: Any,
        causal: bool,
        training: bool | None,
    ) -> Any:
        for name, given in (("mask", attention_mask), ("bias", attention_bias)):
            if given is not None:
                raise ValueError(
                    f"{type(self).__name__} has no scores that an attention_{name} of shape "
                    f"{tuple(given.shape)} could act on: use value_mask for padding and "
                    "causal=True for order, or MultiHeadAttention."
                )
        wide = keras.backend.result_type(self.compute_dtype, "float32")
        query, key = (ops.cast(x, wide) for x in (query, self.for_all_heads(key)))
        query, key, _ = self.features(query, key, source_mask)
        value = self.for_all_heads(value)
        return linear_attention(query, key, value, source_mask, causal, self.chunk_size)

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        """What `step` needs before the first token: sums of nothing.

        They are `sums` (batch, heads, features, value_dim + 1), however long the text, and
        `scale`, the logarithm of the factor that was taken out of them.
        """
        wide = keras.backend.result_type(self.compute_dtype, "float32")
        shape = (batch_size, self.num_heads, self.num_features, self.value_dim + 1)
        nothing = ops.full((batch_size, self.num_heads, 1, 1), -1e30, wide)
        return {"sums": ops.zeros(shape, wide), "scale": nothing}

    def attend_step(
        self, query: Any, key: Any, value: Any, state: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        wide = state["sums"].dtype
        query, key = (ops.cast(x, wide) for x in (query, self.for_all_heads(key)))
        query, key, scale = self.features(query, key, None)
        scale = ops.zeros_like(key[..., :1]) if scale is None else scale
        scale = ops.transpose(scale, (0, 2, 1, 3))  # (batch, heads, 1, 1)
        largest = ops.maximum(state["scale"], scale)
        value = with_one(ops.cast(self.for_all_heads(value), wide))
        sums = state["sums"] * ops.exp(state["scale"] - largest)
        new = ops.einsum("bshm,bshv->bhmv", key, value)
        sums = sums + new * ops.exp(scale - largest)
        heads = quotient(ops.einsum("bthm,bhmv->bthv", query, sums), self.value_dim)
        heads = ops.cast(heads, self.compute_dtype)
        return heads, {"sums": sums, "scale": largest}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "chunk_size": self.chunk_size}


def without_overflow(logits: Any, mask: Any) -> tuple[Any, Any]:
    """exp(logits - c) of keys for the largest c of a text and head that counts, and c.

    No gradient goes through c, on which the attention does not depend.
    """
    counting = logits
    if mask is not None:
        counting = ops.where(ops.cast(mask, "bool")[:, :, None, None], logits, -1e30)
    largest = ops.stop_gradient(ops.max(counting, axis=(1, 3), keepdims=True))
    return ops.exp(ops.minimum(logits - largest, 0.0)), largest
