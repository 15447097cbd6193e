"""Softmax attention's exponential as a polynomial, whose features are finite and exact.

    taylor    exp(x) ≈ Σ_(p <= n) x^p / p!      error at most e^|x| |x|^(n+1) / (n+1)!
    limit     exp(x) ≈ (1 + x/n)^n              relative error about x² / 2n

A power (q·k)^p is a product of features q_i1 ... q_ip. Those that differ in order only are the
same, so one for each multi-index α with |α| <= n is enough, C(d+n, n) in all:

    φ_α(q) = √c_α q^α,    c_α = 1 / α!  or  n! / ((n - |α|)! α! n^|α|)

Both polynomials are positive for even n (the limit may be zero); for odd n they are negative
somewhere, and weights would be. Nothing is random: the weights are exactly those of the
polynomial, good where |q·k| / √d is small. The taylor form is far better at the same n.

Cost per head: 2 n C(d+n, n) value_dim multiplications for texts of n tokens, so keys must be
narrow: order 2 has 2,145 features for d = 64, and 153 for d = 16.

Source: kexue.fm/archives/8601; positivity: kexue.fm/archives/7919.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext.layers.attention.feature_sums import FeatureAttention

KINDS = ("taylor", "limit")


def polynomial_features(x: Any, order: int, kind: str = "taylor") -> Any:
    """Features whose products are the polynomial of q·k.

    Args:
        x: queries or keys (..., d).
        order: n.
        kind: "taylor" or "limit".

    Returns: (..., C(d+n, n)).

    Example:
        >>> q, k = np.array([0.5, 0.2]), np.array([0.4, -0.1])
        >>> products = polynomial_features(q, 2) * polynomial_features(k, 2)
        >>> round(float(ops.sum(products)), 4)  # 1 + 0.18 + 0.18² / 2
        1.1962
    """
    x = ops.convert_to_tensor(x)
    size = x.shape[-1]
    monomials, parts = ops.ones_like(x[..., :1]), []
    # Of the factors of each monomial of one degree, not decreasing.
    indices: list[tuple[int, ...]] = [()]
    for degree in range(order + 1):
        if degree:
            grown = [
                (number, last)
                for number, factors in enumerate(indices)
                for last in range(factors[-1] if factors else 0, size)
            ]
            indices = [(*indices[number], last) for number, last in grown]
            parents, lasts = np.array(grown).T
            monomials = ops.take(monomials, parents, -1) * ops.take(x, lasts, -1)
        roots = np.sqrt([_coefficient(factors, order, kind) for factors in indices])
        parts.append(monomials * ops.cast(roots, x.dtype))
    return ops.concatenate(parts, -1)


def _coefficient(factors: tuple[int, ...], order: int, kind: str) -> float:
    """c_α of the monomial with these factors."""
    repeats = math.prod(math.factorial(factors.count(i)) for i in set(factors))
    if kind == "taylor":
        return 1 / repeats
    degree = len(factors)
    return math.perm(order, degree) / (repeats * order**degree)


@keras.saving.register_keras_serializable(package="keras_ext")
class PolynomialAttention(FeatureAttention):
    """Attention between learned projections by a polynomial in place of the exponential.

        o_i = Σ_j P(q_i·k_j / √d) v_j / Σ_j P(q_i·k_j / √d)
        P(x) = Σ_(p <= n) x^p / p!  or  (1 + x/n)^n

    Args:
        num_heads: number of heads.
        key_dim: d, width of a head's queries and keys; there are C(d+n, n) features.
        value_dim: width of a head's values. Default: `key_dim`.
        num_kv_heads: number of heads of keys and values, which divides `num_heads`. Default:
            `num_heads`.
        order: n, even. Default: 2.
        kind: of the polynomial, "taylor" or "limit". Default: "taylor".
        causal: tokens see no later ones. Default: False.
        chunk_size: of the causal form; changes nothing but speed. Default: 128.
        use_bias, output_shape, kernel_initializer, bias_initializer, kernel_regularizer,
            bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: as of
            `MultiHeadAttention`.

    Call arguments: those of `LinearAttention`.

    Raises:
        ValueError: a number is not positive, `order` is odd, or `kind` is unknown.

    Example:
        >>> attention = PolynomialAttention(2, key_dim=4, value_dim=16)
        >>> x = keras.random.normal((2, 5, 32))
        >>> tuple(attention(x, x).shape), attention.num_features
        ((2, 5, 32), 15)

    Reference: kexue.fm/archives/8601, 7919; Arora et al. 2024, arXiv 2402.18668 (order 2).
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        order: int = 2,
        kind: str = "taylor",
        causal: bool = False,
        chunk_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads, key_dim, value_dim, num_kv_heads, causal, chunk_size, **kwargs
        )
        if order < 2 or order % 2:
            raise ValueError(
                f"order must be even and positive, got {order}: odd polynomials have negative "
                "weights."
            )
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        self.order = order
        self.kind = kind

    @property
    def num_features(self) -> int:
        return math.comb(self.key_dim + self.order, self.order)

    def features(self, query: Any, key: Any, mask: Any) -> tuple[Any, Any, None]:
        root = self.key_dim**-0.25
        query, key = (
            polynomial_features(x * root, self.order, self.kind) for x in (query, key)
        )
        return query, key, None

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "order": self.order, "kind": self.kind}
