"""Linear attention: softmax attention's weights replaced by products of features.

    o_i = Σ_j φ(q_i)ᵀφ(k_j) v_j / Σ_j φ(q_i)ᵀφ(k_j)

    elu        φ(x) = elu(x) + 1                                     x + 1, or e^x for x < 0
    exp        φ(x) = e^x
    softmax    φ(q) = softmax over the features, φ(k) = softmax over the tokens
    taylor     φ(x) = [1; x/|x|], weights 1 + cos(q, k)

It computes other functions than softmax attention, so a trained model does not survive the
exchange without training. Its matrix of weights has at most the rank m of the number of
features: it averages, and finds single tokens badly. Wider keys help (a key_dim of 4 times that
of the values). Use it where texts are long: it needs fewer operations than softmax from n > m
on, and less time later, see `analysis.crossover`.

For the sums, their cost and the causal form see `feature_sums.py`.

Source: Katharopoulos et al. 2020, arXiv 2006.16236; softmax features: Shen et al. 2018, arXiv
1812.01243; taylor: kexue.fm/archives/7546; exp: kexue.fm/archives/8338.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.feature_sums import FeatureAttention, without_overflow
from keras_ext.numerics import direction

FEATURE_MAPS = ("elu", "exp", "softmax", "taylor")


@keras.saving.register_keras_serializable(package="keras_ext")
class LinearAttention(FeatureAttention):
    """Attention in linear time between learned projections.

        o_i = Σ_j φ(q_i)ᵀφ(k_j) v_j / Σ_j φ(q_i)ᵀφ(k_j),    output = [head_1, ..., head_n] W_o

    The call is that of `MultiHeadAttention`. With `causal=True`, `step` decodes token by token
    with a state of constant size.

    Args:
        num_heads: number of heads.
        key_dim: width of a head's queries and keys.
        value_dim: width of a head's values. Default: `key_dim`.
        num_kv_heads: number of heads of keys and values, which divides `num_heads`. Default:
            `num_heads`.
        feature_map: φ: "elu", "exp", "softmax" (not causal), "taylor", or a function of
            (batch, length, heads, key_dim) with nonnegative values; to be saved, it has to be
            registered (`keras.saving.register_keras_serializable`). Default: "elu".
        causal: tokens see no later ones. Default: False.
        chunk_size: of the causal form; changes nothing but speed. Default: 128.
        use_bias, output_shape, kernel_initializer, bias_initializer, kernel_regularizer,
            bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: as of
            `MultiHeadAttention`.

    Call arguments:
        query: (batch, targets, width).
        value: (batch, sources, value_width).
        key: (batch, sources, key_width). Default: `value`.
        query_mask, value_mask, key_mask: as of `MultiHeadAttention`.
        attention_mask, attention_bias, return_attention_scores: refused, there are no scores.
        positions: refused.
        use_causal_mask: as `causal`, for this call. Default: False.

    Raises:
        ValueError: a number is not positive, `num_kv_heads` does not divide `num_heads`, the
            feature map is unknown, or it is "softmax" and the attention causal.

    Example:
        >>> attention = LinearAttention(4, 8, causal=True)
        >>> x = keras.random.normal((2, 5, 32))
        >>> tuple(attention(x, x).shape)
        (2, 5, 32)

    Reference: Katharopoulos et al. 2020, arXiv 2006.16236; kexue.fm/archives/7546.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        feature_map: str | Callable[[Any], Any] = "elu",
        causal: bool = False,
        chunk_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads, key_dim, value_dim, num_kv_heads, causal, chunk_size, **kwargs
        )
        if not callable(feature_map) and feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(FEATURE_MAPS)}, or a function, got "
                f"{feature_map!r}."
            )
        self.feature_map = feature_map
        self.feature_means = feature_map == "softmax"
        self._check_order(causal)

    @property
    def num_features(self) -> int:
        if callable(self.feature_map):
            return self.feature_map(ops.zeros((1, 1, 1, self.key_dim))).shape[-1]
        return self.key_dim + (self.feature_map == "taylor")

    def _check_order(self, causal: bool) -> None:
        if causal and self.feature_means:
            raise ValueError(
                'feature_map "softmax" normalises keys over all tokens, later ones included: '
                'use feature_map="exp" for causal attention.'
            )

    def attend(self, *args: Any, causal: bool, **kwargs: Any) -> Any:
        self._check_order(causal)
        return super().attend(*args, causal=causal, **kwargs)

    def features(self, query: Any, key: Any, mask: Any) -> tuple[Any, Any, Any]:
        if callable(self.feature_map):
            return self.feature_map(query), self.feature_map(key), None
        if self.feature_map == "elu":
            return _elu_plus_one(query), _elu_plus_one(key), None
        if self.feature_map == "taylor":
            return _one_and_direction(query), _one_and_direction(key), None
        query, _ = without_overflow(query, None, axis=3)  # the factor cancels
        if self.feature_map == "exp":
            return query, *without_overflow(key, mask)
        key, _ = without_overflow(key, mask, axis=1)  # one for each feature: so does this
        return query, key, None

    def get_config(self) -> dict[str, Any]:
        feature_map = self.feature_map
        if callable(feature_map):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        return {**super().get_config(), "feature_map": feature_map}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LinearAttention":
        feature_map = config["feature_map"]
        if not isinstance(feature_map, str):
            feature_map = keras.saving.deserialize_keras_object(feature_map)
        return cls(**{**config, "feature_map": feature_map})


def _elu_plus_one(x: Any) -> Any:
    # elu(x) + 1 would round e^x to a multiple of 6e-8.
    return ops.where(x > 0, x + 1, ops.exp(ops.minimum(x, 0)))


def _one_and_direction(x: Any) -> Any:
    return ops.concatenate([ops.ones_like(x[..., :1]), direction(x)], -1)
