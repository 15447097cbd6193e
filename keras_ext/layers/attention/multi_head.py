"""Multi-head softmax attention.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V,    scores of -1e30 where the mask forbids

Exact, with O(n²) time and memory. The softmax runs in float32 at least, whatever the compute
dtype, and a query that may attend to nothing gets zeros instead of the mean of the values.

Source: Vaswani et al. 2017, arXiv 1706.03762; kexue.fm/archives/4765.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

MASKED = -1e30  # finite: -inf would make a fully masked row NaN


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: Callable[[Any], Any] | None = None,
) -> Any:
    """Scaled dot-product attention, all heads at once.

    Args:
        query: (batch, targets, heads, key_dim).
        key: (batch, sources, heads, key_dim).
        value: (batch, sources, heads, value_dim).
        mask: boolean of rank 4, broadcastable to (batch, heads, targets, sources);
            True = attend. None attends everywhere.
        dropout: function applied to the attention weights.

    Returns:
        (batch, targets, heads, value_dim) in the dtype of `value`.

    Example:
        >>> q = k = v = keras.random.normal((2, 5, 4, 8))
        >>> tuple(dot_product_attention(q, k, v).shape)
        (2, 5, 4, 8)
    """
    scale = query.shape[-1] ** -0.5
    scores = ops.einsum("bthd,bshd->bhts", query * scale, key)
    scores = ops.cast(scores, keras.backend.result_type(scores.dtype, "float32"))
    if mask is not None:
        scores = ops.where(mask, scores, MASKED)
    weights = ops.cast(ops.softmax(scores), value.dtype)  # (batch, heads, targets, sources)
    if dropout is not None:
        weights = dropout(weights)
    outputs = ops.einsum("bhts,bshd->bthd", weights, value)
    if mask is None:
        return outputs
    attends = ops.any(mask, axis=-1, keepdims=True)  # (batch, heads, targets, 1)
    return ops.where(ops.transpose(attends, (0, 2, 1, 3)), outputs, ops.zeros_like(outputs))


@keras.saving.register_keras_serializable(package="keras_ext")
class MultiHeadAttention(keras.layers.Layer):
    """Softmax attention between learned projections, as in a Transformer.

        head_h = Attention(X W_q^h, Y W_k^h, Z W_v^h),    output = [head_1, ..., head_n] W_o

    The projections `query_dense`, `key_dense`, `value_dense`, `output_dense` are `Dense`
    layers over the heads side by side, so `enable_lora` and `quantize` work on them. The
    output has the width of the query.

    Call arguments:
        query: (batch, targets, width).
        value: (batch, sources, value_width).
        key: (batch, sources, key_width). Default: `value`.
        value_mask: boolean (batch, sources), True = attend. Default: the Keras mask of `value`.
        attention_mask: boolean (batch, targets, sources) or (batch, heads, targets, sources),
            sizes of 1 broadcast; joined with `value_mask`. Default: None.

    Args:
        num_heads: number of heads.
        key_dim: width of a head, of queries, keys and values alike.
        dropout: rate of dropout on the attention weights. Default: 0.
        kernel_initializer: of all projections. Default: "glorot_uniform".

    Raises:
        ValueError: `num_heads` or `key_dim` is not positive.

    Example:
        >>> attention = MultiHeadAttention(num_heads=4, key_dim=8)
        >>> x = keras.random.normal((2, 5, 32))
        >>> tuple(attention(x, x).shape)
        (2, 5, 32)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, size in {"num_heads": num_heads, "key_dim": key_dim}.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        self.supports_masking = True  # the output keeps the mask of the query
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.query_dense = self._projection("query_dense", num_heads * key_dim)
        self.key_dense = self._projection("key_dense", num_heads * key_dim)
        self.value_dense = self._projection("value_dense", num_heads * key_dim)
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def _projection(self, name: str, units: int) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            kernel_initializer=self.kernel_initializer.clone(),
            name=name,
            dtype=self.dtype_policy,
        )

    def build(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> None:
        self.output_dense = self._projection("output_dense", query_shape[-1])
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape or value_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:-1], self.num_heads * self.key_dim))

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        value_mask: Any = None,
        attention_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        heads = dot_product_attention(
            self._split_heads(self.query_dense(query)),
            self._split_heads(self.key_dense(value if key is None else key)),
            self._split_heads(self.value_dense(value)),
            mask=_join_masks(value_mask, attention_mask),
            dropout=lambda weights: self.dropout_layer(weights, training=training),
        )
        width = self.num_heads * self.key_dim
        return self.output_dense(ops.reshape(heads, (*ops.shape(query)[:2], width)))

    def _split_heads(self, x: Any) -> Any:
        return ops.reshape(x, (*ops.shape(x)[:2], self.num_heads, self.key_dim))

    def compute_output_shape(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> tuple:
        return query_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _join_masks(value_mask: Any, attention_mask: Any) -> Any:
    """One mask of rank 4 from padding and pattern, or None."""
    if value_mask is not None:
        value_mask = ops.cast(value_mask, "bool")[:, None, None, :]  # (batch, 1, 1, sources)
    if attention_mask is None:
        return value_mask
    attention_mask = ops.cast(attention_mask, "bool")
    if len(attention_mask.shape) == 3:
        attention_mask = attention_mask[:, None]  # (batch, 1, targets, sources)
    return attention_mask if value_mask is None else ops.logical_and(attention_mask, value_mask)
