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

import numpy as np
from keras import ops

from keras_ext.layers.attention.projected import ProjectedAttention
from keras_ext.numerics import LOG_ZERO, at_least_float32

# What is divided by. In float32 that leaves the gradients a factor of 1e11 until they overflow.
SMALLEST = 1e-27


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    causal: bool = False,
    chunk_size: int = 128,
    feature_means: bool = False,
) -> Any:
    """Means of the values, weighed by the products of features.

    Args:
        query: φ(q), (batch, targets, heads, features), not negative.
        key: φ(k), (batch, sources, heads, features), not negative.
        value: (batch, sources, heads, value_dim).
        mask: boolean (batch, sources), True = attend. Default: None, all.
        causal: the i-th query sees the first i keys only; as many targets as sources.
        chunk_size: C, for causal attention. Default: 128.
        feature_means: first takes the mean of the values for each feature, then that of these
            means; not causal. Default: False.

    Returns:
        (batch, targets, heads, value_dim) in the dtype of `value`; zeros where the weights sum
        to less than 1e-27.

    Raises:
        ValueError: `causal`, and there are not as many targets as sources, or
            `feature_means`.

    Example:
        >>> q = k = keras.random.uniform((2, 5, 4, 8))
        >>> tuple(linear_attention(q, k, keras.random.normal((2, 5, 4, 6)), causal=True).shape)
        (2, 5, 4, 6)
    """
    dtype = value.dtype
    wide = at_least_float32(dtype)
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"Causal linear attention needs as many targets as sources, got {query.shape[1]} "
            f"and {key.shape[1]}."
        )
    if causal and feature_means:
        raise ValueError("feature_means=True takes means over all tokens: set causal=False.")
    query, key, value = (_heads_first(ops.cast(x, wide)) for x in (query, key, value))
    if mask is not None:
        key, value = _without_padding(key, value, mask)
    if causal:
        sums, totals = _causal_sums(query, key, value, chunk_size)
    else:
        sums = ops.matmul(ops.swapaxes(key, 2, 3), value)
        totals = ops.sum(key, axis=2)[..., None]
        if feature_means:
            sums, totals = _quotient(sums, totals), ops.ones_like(totals)
        sums, totals = ops.matmul(query, sums), ops.matmul(query, totals)
    return ops.cast(_heads_first(_quotient(sums, totals)), dtype)


def _heads_first(x: Any) -> Any:
    """(batch, length, heads, size) -> (batch, heads, length, size), and back."""
    return ops.transpose(x, (0, 2, 1, 3))


def _without_padding(key: Any, value: Any, mask: Any) -> tuple[Any, Any]:
    """Zeros where the mask (batch, length) is False; they may be anything there."""
    mask = ops.expand_dims(ops.cast(mask, "bool"), (1, 3))
    key = ops.where(mask, key, ops.zeros_like(key))
    return key, ops.where(mask, value, ops.zeros_like(value))


def _quotient(sums: Any, totals: Any) -> Any:
    """Zero where the totals are too small to divide by."""
    nothing = ops.abs(totals) < SMALLEST
    totals = ops.where(nothing, 1.0, totals)
    # The derivative of a quotient divides by a square, which may underflow: that of 1 does not.
    scale = ops.stop_gradient(totals)
    return ops.where(nothing, 0.0, (sums / scale) / (totals / scale))


def _causal_sums(query: Any, key: Any, value: Any, chunk_size: int) -> tuple[Any, Any]:
    """Σ φ(q_i)ᵀφ(k_j) v_j over j <= i, and without the values: (batch, heads, length, ...)."""
    length = ops.shape(query)[2]
    number = (length + chunk_size - 1) // chunk_size  # ONNX rounds -x // y to zero

    def chunks(x):  # with zeros at the end
        x = ops.pad(x, [(0, 0), (0, 0), (0, number * chunk_size - length), (0, 0)])
        return ops.reshape(x, (-1, x.shape[1], number, chunk_size, x.shape[-1]))

    def together(x):
        x = ops.reshape(x, (-1, x.shape[1], number * chunk_size, x.shape[-1]))
        return x[:, :, :length]

    def before(x):  # the sum over earlier chunks
        first = [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)]
        return ops.cumsum(ops.pad(x[:, :, :-1], first), axis=2)

    query, key, value = chunks(query), chunks(key), chunks(value)
    turned = ops.swapaxes(key, 3, 4)
    sums = before(ops.matmul(turned, value))
    totals = before(ops.sum(key, axis=3)[..., None])
    weights = ops.matmul(query, turned)
    weights = weights * ops.convert_to_tensor(np.tri(chunk_size), weights.dtype)
    sums = ops.matmul(query, sums) + ops.matmul(weights, value)
    totals = ops.matmul(query, totals) + ops.sum(weights, axis=4, keepdims=True)
    return together(sums), together(totals)


class FeatureAttention(ProjectedAttention):
    """Base class: attention by products of features, in linear time.

    A subclass defines `features(query, key, mask)`, which gives φ(q) and φ(k) and what it took
    out of φ(k) against overflow: the logarithm of a factor common to all keys of a text and
    head, (batch, 1, heads, 1), or None. It cancels, but steps must know it. `num_features` is
    the last axis of both.
    """

    feature_means = False  # see `linear_attention`

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
        *,
        causal: bool,
        training: bool | None,
        positions: Any = None,
        return_scores: bool = False,
    ) -> Any:
        self._refuse_patterns(attention_mask, attention_bias)
        if return_scores:
            raise ValueError(
                f"{type(self).__name__} has no scores that return_attention_scores=True could "
                "return: leave it out, or use MultiHeadAttention."
            )
        if positions is not None:
            raise ValueError(
                f"{type(self).__name__} does not know where tokens stand, so positions of "
                f"shape {tuple(positions.shape)} have no effect: add a PositionEmbedding to "
                "the inputs, or use MultiHeadAttention."
            )
        wide = at_least_float32(self.compute_dtype)
        query, key = (ops.cast(x, wide) for x in (query, self.for_all_heads(key)))
        query, key, _ = self.features(query, key, source_mask)
        value = self.for_all_heads(value)
        return linear_attention(
            query, key, value, source_mask, causal, self.chunk_size, self.feature_means
        )

    def _refuse_patterns(self, attention_mask: Any, attention_bias: Any) -> None:
        for name, given in (("mask", attention_mask), ("bias", attention_bias)):
            if given is not None:
                raise ValueError(
                    f"{type(self).__name__} has no scores that an attention_{name} of shape "
                    f"{tuple(given.shape)} could act on: use value_mask for padding and "
                    "causal=True for order, or MultiHeadAttention."
                )

    def initial_state(self, batch_size: int, max_length: int | None = None) -> dict[str, Any]:
        """What `step` needs before the first token: sums of nothing.

        They are `sums` (batch, heads, features, value_dim) and `totals` (batch, heads,
        features, 1), however long the text, so that `max_length` does not matter, and `scale`,
        the logarithm of the factor that was taken out of them.
        """
        wide = at_least_float32(self.compute_dtype)
        shape = (batch_size, self.num_heads, self.num_features)
        return {
            "sums": ops.zeros((*shape, self.value_dim), wide),
            "totals": ops.zeros((*shape, 1), wide),
            "scale": ops.full((*shape[:2], 1, 1), LOG_ZERO, wide),
        }

    def attend_step(
        self,
        query: Any,
        key: Any,
        value: Any,
        state: dict[str, Any],
        valid: Any,
        attention_mask: Any,
        attention_bias: Any,
    ) -> tuple[Any, dict[str, Any]]:
        self._refuse_patterns(attention_mask, attention_bias)
        wide, number = state["sums"].dtype, query.shape[1]
        query, key = (ops.cast(x, wide) for x in (query, self.for_all_heads(key)))
        value = ops.cast(self.for_all_heads(value), wide)
        query, key, scale = self.features(query, key, valid)
        query, key, value = (_heads_first(x) for x in (query, key, value))
        if valid is not None:
            key, value = _without_padding(key, value, valid)
        scale = ops.zeros_like(state["scale"]) if scale is None else _heads_first(scale)
        # The sums so far and the next keys get the larger of their two factors.
        largest = ops.maximum(state["scale"], scale)
        old, key = ops.exp(state["scale"] - largest), key * ops.exp(scale - largest)
        sums, totals = state["sums"] * old, state["totals"] * old
        chunk_size = min(self.chunk_size, number or self.chunk_size)
        among, weights = _causal_sums(query, key, value, chunk_size)
        heads = _quotient(ops.matmul(query, sums) + among, ops.matmul(query, totals) + weights)
        state = {
            "sums": sums + ops.matmul(ops.swapaxes(key, 2, 3), value),
            "totals": totals + ops.sum(key, axis=2)[..., None],
            "scale": largest,
        }
        return ops.cast(_heads_first(heads), self.compute_dtype), state

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "chunk_size": self.chunk_size}


def without_overflow(
    logits: Any, mask: Any, axis: int | tuple[int, ...] = (1, 3)
) -> tuple[Any, Any]:
    """exp(logits - c) for the largest c that counts along the axis, and c.

    Args:
        logits: (batch, length, heads, features).
        mask: boolean (batch, length), which of them count, or None for all.
        axis: over which c is common. Default: length and features.

    No gradient goes through c, on which the attention does not depend.
    """
    counting = logits
    if mask is not None:
        mask = ops.expand_dims(ops.cast(mask, "bool"), (2, 3))
        counting = ops.where(mask, logits, LOG_ZERO)
    largest = ops.stop_gradient(ops.max(counting, axis=axis, keepdims=True))
    return ops.exp(ops.minimum(logits - largest, 0.0)), largest
