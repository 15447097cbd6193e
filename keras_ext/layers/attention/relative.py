"""Relative positions learnt (or fixed) as a table: Shaw's vectors and T5's biases.

Shaw et al. give each distance j - i, clipped to ±m, a vector for the keys and one for the
values, shared by the heads; NEZHA takes the same fixed sinusoids for both:

    s_ij = q_iᵀ (k_j + a_(j-i)) / √d,    o_i = Σ_j p_ij (v_j + b_(j-i))
    a_r = b_r = (sin (r+m)θ_0, cos (r+m)θ_0, sin (r+m)θ_1, ...),    θ_k = 10,000^(-2k/d)

T5 adds one number for each head and bucket of distances, to scores that are not divided by √d:

    s_ij = q_iᵀ k_j + b_bucket(j-i)

Near distances have a bucket each, farther ones share buckets that grow exponentially up to a
maximal distance, the last one takes all beyond.

Exact. Vectors cost targets · sources · d numbers once for all heads and texts, and as many
products again as queries with keys and weights with values; biases cost heads · targets ·
sources numbers. Where texts have positions of their own, each text costs as much.

Source: Shaw, Uszkoreit and Vaswani 2018, arXiv 1803.02155; Wei et al. 2019 (NEZHA), arXiv
1909.00204; Raffel et al. 2020 (T5), arXiv 1910.10683; kexue.fm/archives/8130.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext.layers.attention.positions import Position


def t5_buckets(
    distances: Any, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> np.ndarray:
    """The buckets of distances j - i between a key at j and a query at i, as T5 has them.

    Args:
        distances: integers, an array of any shape.
        num_buckets: of which half are for later keys, if `bidirectional`.
        max_distance: from which on all are in the last bucket.
        bidirectional: False puts all later keys in bucket 0.

    Returns: int32, like `distances`.

    Example:
        >>> t5_buckets([0, -1, -7, -8, -20, -999, 1, 999]).tolist()
        [0, 1, 7, 8, 10, 15, 17, 31]
    """
    distances = np.asarray(distances)
    if bidirectional:
        num_buckets //= 2
        first = np.where(distances > 0, num_buckets, 0)
        distances = np.abs(distances)
    else:
        first = np.zeros_like(distances)
        distances = np.maximum(-distances, 0)
    exact = num_buckets // 2  # the nearest distances have a bucket each
    ratio = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    shared = exact + np.floor(ratio * (num_buckets - exact) + 1e-9)
    shared = np.minimum(shared, num_buckets - 1)
    return (first + np.where(distances < exact, distances, shared)).astype("int32")


def sinusoids(length: int, size: int) -> np.ndarray:
    """Fixed vectors of the positions 0 ... length - 1: sines at even, cosines at odd places.

    Returns: float64 (length, size).

    Example:
        >>> sinusoids(2, 2).round(4).tolist()
        [[0.0, 1.0], [0.8415, 0.5403]]
    """
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, size, 2) / size)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, -1)[:, :size]


def _distances(query_positions: Any, key_positions: Any) -> Any:
    """j - i of keys at j and queries at i, ([batch,] targets, sources)."""
    return ops.expand_dims(key_positions, -2) - ops.expand_dims(query_positions, -1)


def _subscripts(vectors: Any) -> str:
    """Axes of vectors of distances: those of each text, or the same for all."""
    return "btsd" if len(vectors.shape) == 4 else "tsd"


@keras.saving.register_keras_serializable(package="keras_ext")
class RelativePosition(Position, keras.layers.Layer):
    """A vector for each distance, added to keys and values.

        s_ij = q_iᵀ (k_j + a_r) / √d,    o_i = Σ_j p_ij (v_j + b_r),    r = clip(j - i, ±m)

    Weights: `key_table` (2m + 1, key_dim) and `value_table` (2m + 1, value_dim), none with
    `sinusoidal`.

    Args:
        max_distance: m, from which on all distances count as m. Default: 64.
        sinusoidal: fixed sinusoids, as in NEZHA. Default: False, learnt.
        on_values: values have vectors too; False leaves the keys'. Default: True.
        initializer: of the learnt tables. Default: "glorot_uniform".

    Raises:
        ValueError: `max_distance` is below 1.

    Example:
        >>> attention = MultiHeadAttention(4, 8, position=RelativePosition(sinusoidal=True))

    Reference: Shaw et al. 2018, arXiv 1803.02155; NEZHA, arXiv 1909.00204.
    """

    only_encodes = False

    def __init__(
        self,
        max_distance: int = 64,
        sinusoidal: bool = False,
        on_values: bool = True,
        initializer: Any = "glorot_uniform",
        name: str = "relative_position",  # no number: it is in the paths of the weights
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        if max_distance < 1:
            raise ValueError(f"max_distance must be at least 1, got {max_distance}.")
        self.max_distance = max_distance
        self.sinusoidal = sinusoidal
        self.on_values = on_values
        self.initializer = keras.initializers.get(initializer)

    def build(self, query_shape: tuple, value_shape: tuple) -> None:
        """For queries and values (batch, length, heads, size)."""
        self.key_table = self._table("key_table", query_shape[-1])
        if self.on_values:
            self.value_table = self._table("value_table", value_shape[-1])

    def _table(self, name: str, size: int) -> Any:
        shape = (2 * self.max_distance + 1, size)
        if self.sinusoidal:
            return sinusoids(*shape)
        return self.add_weight(shape=shape, initializer=self.initializer.clone(), name=name)

    def _vectors(self, table: Any, query_positions: Any, key_positions: Any, dtype: Any) -> Any:
        distances = _distances(query_positions, key_positions)
        rows = ops.clip(distances, -self.max_distance, self.max_distance) + self.max_distance
        return ops.take(ops.cast(table, dtype), rows, axis=0)

    def scores(self, query: Any, key: Any, query_positions: Any, key_positions: Any) -> Any:
        scores = super().scores(query, key, query_positions, key_positions)
        vectors = self._vectors(self.key_table, query_positions, key_positions, query.dtype)
        relative = ops.einsum(f"bthd,{_subscripts(vectors)}->bhts", query, vectors)
        return scores + ops.cast(relative, scores.dtype)

    def outputs(
        self, weights: Any, value: Any, query_positions: Any, key_positions: Any
    ) -> Any:
        outputs = super().outputs(weights, value, query_positions, key_positions)
        if not self.on_values:
            return outputs
        vectors = self._vectors(self.value_table, query_positions, key_positions, value.dtype)
        return outputs + ops.einsum(f"bhts,{_subscripts(vectors)}->bthd", weights, vectors)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "max_distance": self.max_distance,
            "sinusoidal": self.sinusoidal,
            "on_values": self.on_values,
            "initializer": keras.initializers.serialize(self.initializer),
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class T5Bias(Position, keras.layers.Layer):
    """A learnt number for each head and bucket of distances, added to the scores.

        s_ij = q_iᵀ k_j + b[bucket(j - i), head]

    As the `position` of an attention it belongs to that one. Where layers share it, as in T5,
    call it once and pass what it gives to all of them:

        bias = T5Bias(num_heads)(hidden)
        hidden = attention(hidden, hidden, attention_bias=bias)

    T5's attention does not divide by √d: `MultiHeadAttention(..., scale=1.0, use_bias=False)`.
    Weight: `embeddings` (num_buckets, num_heads).

    Args:
        num_heads: of the attention.
        num_buckets: Default: 32.
        max_distance: from which on distances are not told apart. Default: 128.
        bidirectional: tell later keys apart; False for a decoder. Default: True.
        initializer: of the biases. Default: "zeros".

    Call arguments:
        query: (batch, targets, ...), of which only the length matters.
        key: (batch, sources, ...). Default: `query`.
        The output has the shape (1, num_heads, targets, sources).

    Raises:
        ValueError: there are fewer than 4 buckets (2, if not `bidirectional`), their number is
            odd and they are `bidirectional`, or `max_distance` leaves none to share.

    Example:
        >>> tuple(T5Bias(num_heads=4)(np.zeros((2, 5, 32))).shape)
        (1, 4, 5, 5)

    Reference: Raffel et al. 2020, arXiv 1910.10683; kexue.fm/archives/8130.
    """

    only_encodes = False

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        initializer: Any = "zeros",
        name: str = "t5_bias",  # no number: it is in the path of the weight
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        sides = 2 if bidirectional else 1
        if num_buckets < 2 * sides or num_buckets % sides:
            raise ValueError(
                f"num_buckets must be {'even and ' if bidirectional else ''}at least "
                f"{2 * sides} with bidirectional={bidirectional}, got {num_buckets}."
            )
        if max_distance <= num_buckets // sides // 2:
            raise ValueError(
                f"max_distance must exceed {num_buckets // sides // 2}, the distances with a "
                f"bucket each, got {max_distance}."
            )
        self.supports_masking = True
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.initializer = keras.initializers.get(initializer)
        reach = np.arange(-max_distance, max_distance + 1)
        self._buckets = t5_buckets(reach, num_buckets, max_distance, bidirectional)

    def build(self, query_shape: tuple, *others: tuple) -> None:
        self.embeddings = self.add_weight(
            shape=(self.num_buckets, self.num_heads),
            initializer=self.initializer,
            name="embeddings",
        )

    def call(self, query: Any, key: Any = None) -> Any:
        key = query if key is None else key
        positions = (ops.arange(ops.shape(x)[1]) for x in (query, key))
        return ops.cast(self.biases(*positions), self.compute_dtype)

    def biases(self, query_positions: Any, key_positions: Any) -> Any:
        """Those of queries and keys at these positions, (1, num_heads, targets, sources).

        With positions (batch, length) there are as many of them as texts.
        """
        distances = _distances(query_positions, key_positions)
        reach = ops.clip(distances, -self.max_distance, self.max_distance) + self.max_distance
        of_distance = ops.take(self.embeddings, self._buckets, axis=0)  # (2 max + 1, heads)
        bias = ops.take(of_distance, reach, axis=0)  # ([batch,] targets, sources, heads)
        bias = ops.moveaxis(bias, -1, -3)
        return bias if len(bias.shape) == 4 else bias[None]

    def scores(self, query: Any, key: Any, query_positions: Any, key_positions: Any) -> Any:
        scores = super().scores(query, key, query_positions, key_positions)
        return scores + ops.cast(self.biases(query_positions, key_positions), scores.dtype)

    def compute_mask(self, query: Any, key: Any = None, mask: Any = None) -> None:
        return None

    def compute_output_shape(self, query_shape: tuple, key_shape: tuple | None = None) -> tuple:
        return (1, self.num_heads, query_shape[1], (key_shape or query_shape)[1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "initializer": keras.initializers.serialize(self.initializer),
        }
