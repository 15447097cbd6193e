"""GlobalPointer: a score for each span of a text and each type, for nested and flat entities.

A span (i, j) is scored as a whole, by its first and its last token, both inclusive:

    s_a(i, j) = q_a,iᵀ k_a,j / √d,    q_a,i = R_i (W_q,a h_i + b),  k_a,j = R_j (W_k,a h_j + b)

with rotary positions R, without which the scores know no span length and long texts fail
(People's Daily: F1 54 instead of 96). The efficient form shares one query and key between the
types, which only add what start and end say alone, and has 4d weights a type instead of 2Dd:

    s_a(i, j) = q_iᵀ k_j / √d + u_aᵀ [q_i; k_i] + v_aᵀ [q_j; k_j]

Train with `keras_ext.losses.MultilabelCrossentropy(class_axes=2)`; a span is an entity where
its score is positive. For one span a text (reading comprehension) take the softmax over all.

Spans with padding, and those that end before they start, score -16384. That is a number in
every float format (also twice: -1e30 overflows in float16), so no gradient, product or
cross-entropy of it is NaN, as those of -inf can be, and exp(-16384) is 0 in all of them.

Cost: O(types · length² · d) time, batch · types · length² scores; no dynamic programming.

Source: kexue.fm/archives/8373, 8877; Su et al. 2022, arXiv 2208.03054.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.positions import rotary_embedding
from keras_ext.layers.every import dtype_config, sublayer_dtype

MASKED = -16384.0


def span_scores(query: Any, key: Any, rope: bool = True) -> Any:
    """Scores of all spans: scaled products of the query at the start, the key at the end.

    Args:
        query, key: (batch, length, heads, size).
        rope: rotate both by their positions first. Default: True.

    Returns: (batch, heads, length, length), start before end.

    Example:
        >>> q = k = keras.random.normal((2, 5, 3, 8))
        >>> tuple(span_scores(q, k).shape)
        (2, 3, 5, 5)
    """
    if rope:
        query, key = rotary_embedding(query), rotary_embedding(key)
    query = ops.transpose(query, (0, 2, 1, 3)) * query.shape[-1] ** -0.5
    return query @ ops.transpose(key, (0, 2, 3, 1))  # ops.einsum rounds float64 to float32


def mask_spans(scores: Any, mask: Any = None, tril: bool = True) -> Any:
    """Set what is no span to -16384.

    Args:
        scores: (batch, heads, length, length).
        mask: boolean (batch, length), False at padding. Default: None.
        tril: mask the lower triangle, where start > end. Default: True.

    Returns: like `scores`.

    Example:
        >>> keras.ops.convert_to_numpy(mask_spans(np.zeros((1, 1, 2, 2))))[0, 0].tolist()
        [[0.0, 0.0], [-16384.0, 0.0]]
    """
    scores = ops.convert_to_tensor(scores)
    if tril:
        positions = ops.arange(ops.shape(scores)[-1])
        scores = ops.where(positions[:, None] <= positions, scores, MASKED)
    if mask is not None:
        mask = ops.cast(mask, "bool")
        both = ops.logical_and(mask[:, None, :, None], mask[:, None, None, :])
        scores = ops.where(both, scores, MASKED)
    return scores


@keras.saving.register_keras_serializable(package="keras_ext")
class GlobalPointer(keras.layers.Layer):
    """Score each span of a text for each type.

        s_a(i, j) = q_a,iᵀ k_a,j / √d

    In bfloat16 a score of 10 is rounded to 0.06. In a model with mixed precision give this
    layer `dtype="float32"`, as any layer before a loss.

    Args:
        heads: number of types.
        head_size: d, even with `rope`. Default: 64.
        rope: rotary positions. Default: True.
        use_bias: of the projections. Default: True.
        tril: mask spans that end before they start. Default: True; False for pairs without
            an order, such as subject and object.
        kernel_initializer: of the projections. Default: "lecun_normal".

    Call arguments:
        inputs: (batch, length, width).
        mask: boolean (batch, length), True = token. Default: the Keras mask of the inputs.
            The outputs (batch, heads, length, length) have none: it is within the scores.

    Raises:
        ValueError: `heads` or `head_size` is not positive, or `head_size` is odd with `rope`.

    Example:
        >>> hidden = keras.random.normal((2, 7, 32))
        >>> tuple(GlobalPointer(heads=10)(hidden, mask=np.ones((2, 7), bool)).shape)
        (2, 10, 7, 7)

    Reference: kexue.fm/archives/8373; arXiv 2208.03054.
    """

    def __init__(
        self,
        heads: int,
        head_size: int = 64,
        rope: bool = True,
        use_bias: bool = True,
        tril: bool = True,
        kernel_initializer: Any = "lecun_normal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, size in {"heads": heads, "head_size": head_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        if rope and head_size % 2:
            raise ValueError(f"head_size must be even with rope=True, got {head_size}.")
        self.supports_masking = True
        self.heads = heads
        self.head_size = head_size
        self.rope = rope
        self.use_bias = use_bias
        self.tril = tril
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self._make_projections()

    def _make_projections(self) -> None:
        self.dense = self._projection("dense", 2 * self.heads * self.head_size)

    def _projection(self, name: str, units: int) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            name=name,
            dtype=sublayer_dtype(self, name),
        )

    def build(self, inputs_shape: tuple) -> None:
        self.dense.build(inputs_shape)

    def call(self, inputs: Any, mask: Any = None) -> Any:
        return mask_spans(self._scores(inputs), mask, self.tril)

    def _scores(self, inputs: Any) -> Any:
        shape = (*ops.shape(inputs)[:2], self.heads, 2 * self.head_size)
        query, key = ops.split(ops.reshape(self.dense(inputs), shape), 2, axis=-1)
        return span_scores(query, key, self.rope)

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        return None

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return (inputs_shape[0], self.heads, inputs_shape[1], inputs_shape[1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dtype": dtype_config(self),
            "heads": self.heads,
            "head_size": self.head_size,
            "rope": self.rope,
            "use_bias": self.use_bias,
            "tril": self.tril,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class EfficientGlobalPointer(GlobalPointer):
    """`GlobalPointer` with one query and key for all types, and two vectors a type.

        s_a(i, j) = q_iᵀ k_j / √d + u_aᵀ p_i + v_aᵀ p_j,    p = [q; k] without positions

    As in bert4keras the even columns of `dense` are q, the odd ones k, the even columns of
    `type_dense` are 2v, the odd ones 2u, each with a bias.

    Args, call arguments, raises: those of `GlobalPointer`.

    Example:
        >>> layer = EfficientGlobalPointer(heads=10)
        >>> tuple(layer(keras.random.normal((2, 7, 32))).shape)
        (2, 10, 7, 7)

    Reference: kexue.fm/archives/8877; arXiv 2208.03054.
    """

    def _make_projections(self) -> None:
        self.dense = self._projection("dense", 2 * self.head_size)
        self.type_dense = self._projection("type_dense", 2 * self.heads)

    def build(self, inputs_shape: tuple) -> None:
        super().build(inputs_shape)
        self.type_dense.build((*inputs_shape[:-1], 2 * self.head_size))

    def _scores(self, inputs: Any) -> Any:
        shared = self.dense(inputs)
        batch, length = ops.shape(inputs)[:2]
        query, key = ops.unstack(
            ops.reshape(shared, (batch, length, 1, self.head_size, 2)), axis=-1
        )
        types = ops.reshape(self.type_dense(shared) / 2, (batch, length, self.heads, 2))
        end, start = ops.unstack(ops.transpose(types, (3, 0, 2, 1)))  # (batch, heads, length)
        scores = span_scores(query, key, self.rope)  # (batch, 1, length, length)
        return scores + ops.expand_dims(start, -1) + ops.expand_dims(end, -2)
