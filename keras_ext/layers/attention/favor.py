"""FAVOR+: softmax attention estimated by random features, in linear time.

    exp(q·k) = E[φ(q)·φ(k)],    rows ω_1 ... ω_r of the projection ~ N(0, I)

    positive         φ(x) = exp(ωx - |x|²/2) / √r                            r features
    hyperbolic       φ(x) = exp(-|x|²/2) [exp(ωx); exp(-ωx)] / √(2r)         2r features
    trigonometric    φ(x) = exp(+|x|²/2) [cos ωx; sin ωx] / √r               2r features

Unbiased in every dimension if the rows are. A block of d orthogonal rows is: QR of a Gaussian
matrix gives Q, uniform over the rotations only after each column is multiplied by the sign of
the diagonal of R, and each row gets a length of its own, χ(d)-distributed. Without the signs,
as in the usual implementations, exp(q·k) is underestimated (by 18 % at d = 4, 1 % at 64).

The estimate is good where |q + k| is small: the mean square error of one positive feature is
exp(|q + k|²) times that of exp(q·k) itself (1 - exp(-|q + k|²) of it, to be exact), so that the
number of features for a given error grows as exp(|q + k|²). Orthogonal rows lower it a little
(to 0.85 at d = 16, r = 32), hyperbolic features are never worse than as many positive ones.
Trigonometric features are best for equal q and k, but can be negative, so their weights are no
average and the normaliser may vanish: use them to compare.

Cost per head: n r (d + 2 value_dim) multiplications against n² (d + value_dim) of softmax.

Source: Choromanski et al. 2020, arXiv 2009.14794; kexue.fm/archives/7921.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.feature_sums import FeatureAttention, without_overflow

KINDS = ("positive", "hyperbolic", "trigonometric")


def orthogonal_projection(num_rows: int, size: int, seed: Any = None) -> Any:
    """Rows distributed as N(0, I), orthogonal to each other within blocks of `size` rows.

    Args:
        num_rows: r.
        size: d, of a row.
        seed: an integer, a `keras.random.SeedGenerator`, or None for a random one.

    Returns: float32 (num_rows, size).

    Example:
        >>> projection = orthogonal_projection(8, 4, seed=0)
        >>> float(abs(ops.matmul(projection[0], projection[1]))) < 1e-5
        True
    """
    seed = seed if hasattr(seed, "next") else keras.random.SeedGenerator(seed)
    blocks = -(-num_rows // size)
    q, r = ops.qr(keras.random.normal((blocks, size, size), seed=seed))
    q = q * ops.sign(ops.diagonal(r, axis1=-2, axis2=-1))[:, None]  # uniform over rotations
    normal = keras.random.normal((blocks, size, size), seed=seed)
    lengths = ops.sqrt(ops.sum(ops.square(normal), -1, keepdims=True))
    return ops.reshape(q * lengths, (-1, size))[:num_rows]


def random_features(x: Any, projection: Any, kind: str = "positive") -> Any:
    """Features whose products estimate exp(q·k).

    Args:
        x: queries or keys (..., d), of moderate length: exponentials are taken as they are.
        projection: of `orthogonal_projection`, (r, d).
        kind: "positive", "hyperbolic" or "trigonometric".

    Returns: (..., r), or (..., 2r) for the last two kinds.

    Example:
        >>> projection = orthogonal_projection(4096, 4, seed=0)
        >>> vectors = np.array([[0.5, 0.1, 0.0, 0.2], [0.2, 0.3, 0.1, 0.0]], "float32")
        >>> q, k = random_features(vectors, projection)
        >>> bool(abs(float(ops.sum(q * k)) - np.exp(0.13)) < 0.05)
        True
    """
    factor, exponent = _parts(ops.convert_to_tensor(x), projection, kind)
    number = projection.shape[0] * (2 if kind == "hyperbolic" else 1)
    return factor * ops.exp(exponent) / number**0.5


def _parts(x: Any, projection: Any, kind: str) -> tuple[Any, Any]:
    """φ(x) = factor · exp(exponent), but for √r; both broadcast to the features."""
    products = ops.matmul(x, ops.transpose(ops.cast(projection, x.dtype)))
    half = ops.sum(ops.square(x), -1, keepdims=True) / 2
    if kind == "trigonometric":
        return ops.concatenate([ops.cos(products), ops.sin(products)], -1), half
    if kind == "hyperbolic":
        products = ops.concatenate([products, -products], -1)
    return ops.ones_like(half), products - half


@keras.saving.register_keras_serializable(package="keras_ext")
class FavorAttention(FeatureAttention):
    """Softmax attention between learned projections, estimated in linear time.

        o_i = Σ_j φ(q_i)ᵀφ(k_j) v_j / Σ_j φ(q_i)ᵀφ(k_j),    E[φ(q)ᵀφ(k)] = exp(q·k / √d)

    The projection is a weight that is not trained: it is saved, and drawn again by `redraw` or
    the callback `training.RedrawFeatures` only. It is the same for all heads. Exponents are
    taken relative to the largest of a query's, and of all keys of a head, which cancels.

    Args:
        num_heads: number of heads.
        key_dim: d, width of a head's queries and keys.
        value_dim: width of a head's values. Default: `key_dim`.
        num_kv_heads: number of heads of keys and values, which divides `num_heads`. Default:
            `num_heads`.
        num_features: length of φ(x), even if not positive. Default: 256.
        kind: of features: "positive", "hyperbolic", or "trigonometric" for comparisons.
            Default: "positive".
        causal: tokens see no later ones. Default: False.
        chunk_size: of the causal form; changes nothing but speed. Default: 128.
        seed: of the projections. Default: a random one.
        use_bias, output_shape, kernel_initializer, bias_initializer, kernel_regularizer,
            bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: as of
            `MultiHeadAttention`.

    Call arguments: those of `LinearAttention`.

    Raises:
        ValueError: a number is not positive, `num_features` is odd where it must not, or `kind`
            is unknown.

    Example:
        >>> attention = FavorAttention(4, 8, num_features=64)
        >>> x = keras.random.normal((2, 5, 32))
        >>> tuple(attention(x, x).shape)
        (2, 5, 32)

    Reference: Choromanski et al. 2020, arXiv 2009.14794; kexue.fm/archives/7921.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        num_features: int = 256,
        kind: str = "positive",
        causal: bool = False,
        chunk_size: int = 128,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads, key_dim, value_dim, num_kv_heads, causal, chunk_size, **kwargs
        )
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        if num_features < 1 or (kind != "positive" and num_features % 2):
            even = "" if kind == "positive" else "even and "
            raise ValueError(f"num_features must be {even}positive, got {num_features}.")
        self.num_features = num_features
        self.kind = kind
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> None:
        super().build(query_shape, value_shape, key_shape)
        rows = self.num_features // (1 if self.kind == "positive" else 2)
        self.projection = self.add_weight(
            shape=(rows, self.key_dim),
            initializer=lambda shape, dtype: ops.cast(self._draw(*shape), dtype),
            trainable=False,
            name="projection",
        )

    def _draw(self, rows: int, size: int) -> Any:
        return orthogonal_projection(rows, size, self.seed_generator)

    def redraw(self) -> None:
        """Draw another projection."""
        self.projection.assign(self._draw(*self.projection.shape))

    def features(self, query: Any, key: Any, mask: Any) -> tuple[Any, Any, Any]:
        root = self.key_dim**-0.25
        of_query, exponent = _parts(query * root, self.projection, self.kind)
        exponent = exponent - ops.stop_gradient(ops.max(exponent, -1, keepdims=True))
        of_key, logits = _parts(key * root, self.projection, self.kind)
        scaled, largest = without_overflow(logits, mask)
        return of_query * ops.exp(exponent), of_key * scaled, largest

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_features": self.num_features,
            "kind": self.kind,
            "seed": self.seed,
        }
