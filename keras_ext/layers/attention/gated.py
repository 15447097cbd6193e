"""Gated attention unit (GAU): attention and feed-forward in one, with a single head.

    [u, v, z] = act(x W_i),    q = RoPE(z γ_q),    k = RoPE(z γ_k)
    A = softmax(λ log_N(max(n, 16)) q kᵀ),    output = (u ⊙ A v) W_o,    λ = 1/√key_dim

for n tokens attended to and N = 512. The gate u takes the place of the feed-forward layers: two
units have about the weights of a Transformer block.

The paper normalises by relu²(q kᵀ)/n. This is the unit of GAU-alpha, with a softmax.

Source: Hua et al. 2022, arXiv 2202.10447; kexue.fm/archives/8934, 9019, 9052; log-n: 8823.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.attention.cache import empty_cache, extend_cache, next_positions
from keras_ext.layers.attention.decoding import check_order
from keras_ext.layers.attention.dot_product import (
    dot_product_attention,
    join_masks,
    log_scaled,
)
from keras_ext.layers.attention.positions import Position, given_positions
from keras_ext.layers.every import dtype_config, sublayer_dtype
from keras_ext.layers.rows import by_rows
from keras_ext.layers.transformer import named_norm, norm_config, serialize_unbuilt

LOG_LENGTH, LEAST = 512, 16  # of the log-n scaling; below 16 tokens it does harm


@keras.saving.register_keras_serializable(package="keras_ext")
class GatedAttentionUnit(keras.layers.Layer):
    """Self-attention of one head, gated; it needs no feed-forward layers after it.

    Sublayers: `input_dense`, of u, v and z side by side, and `output_dense`. Weights:
    `query_gamma` and `key_gamma`.

    Args:
        units: width of u and v, twice that of the input in GAU-alpha.
        key_dim: width of z. Default: 128.
        activation: act. Default: "silu".
        dropout: rate of dropout on the attention weights. Default: 0.
        position: a `RotaryPosition`, for instance. Default: none.
        causal: tokens see no later ones. Default: False.
        kernel_initializer: of both layers. Default: "glorot_uniform".

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        attention_mask: boolean (batch, length, length), True = attend; joined with the Keras
            mask of the inputs. Default: None.
        positions: where the tokens stand, integers (batch, length), for `position`. Default:
            0 ... length - 1.

    Raises:
        ValueError: `units` or `key_dim` is not positive, or does not suit `position`. In a
            call: positions come without a `position`, or are not integers (batch, length).

    Example:
        >>> unit = GatedAttentionUnit(units=64, key_dim=16, position=RotaryPosition())
        >>> tuple(unit(keras.ops.zeros((2, 5, 32))).shape)
        (2, 5, 32)

    Reference: Hua et al. 2022, arXiv 2202.10447; kexue.fm/archives/9052.
    """

    def __init__(
        self,
        units: int,
        key_dim: int = 128,
        activation: Any = "silu",
        dropout: float = 0.0,
        position: Position | None = None,
        causal: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, size in (("units", units), ("key_dim", key_dim)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        if position is not None and key_dim % position.key_dim_multiple:
            raise ValueError(
                f"key_dim must be a multiple of {position.key_dim_multiple} for "
                f"{type(position).__name__}, got {key_dim}."
            )
        self.supports_masking = True
        self.units = units
        self.key_dim = key_dim
        self.activation = keras.activations.get(activation)
        self.dropout = dropout
        self.position = position
        self.causal = causal
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.input_dense = self._dense("input_dense", 2 * units + key_dim, self.activation)
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def _dense(self, name: str, units: int, activation: Any = None) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            activation=activation,
            use_bias=False,
            kernel_initializer=self.kernel_initializer.clone(),
            name=name,
            dtype=sublayer_dtype(self, name),
        )

    def build(self, inputs_shape: tuple) -> None:
        self.output_dense = self._dense("output_dense", inputs_shape[-1])
        self.input_dense.build(inputs_shape)
        self.output_dense.build((*inputs_shape[:-1], self.units))
        self.query_gamma, self.key_gamma = (
            self.add_weight(shape=(self.key_dim,), initializer="ones", name=name)
            for name in ("query_gamma", "key_gamma")
        )
        if isinstance(self.position, keras.layers.Layer):
            heads = (*inputs_shape[:-1], 1)
            self.position.build((*heads, self.key_dim), (*heads, self.units))

    def call(
        self,
        inputs: Any,
        attention_mask: Any = None,
        positions: Any = None,
        training: bool | None = None,
        mask: Any = None,
        inputs_mask: Any = None,  # what Keras calls it beside another tensor
    ) -> Any:
        position = self.position or Position()
        if training:
            position = position.in_training()
        if positions is None:
            positions = ops.arange(ops.shape(inputs)[1])
        else:
            positions = given_positions(positions, self.position, inputs)
        u, query, key, value = self._project(inputs, position, positions)
        seen = join_masks(mask if inputs_mask is None else inputs_mask, attention_mask)
        attended = dot_product_attention(
            log_scaled(query, key, LOG_LENGTH, seen, self.causal, LEAST),
            key,
            value,
            mask=seen,
            causal=self.causal,
            position=position,
            positions=(positions, positions),
            dropout=(lambda w: self.dropout_layer(w, training=True))
            if training and self.dropout
            else None,
        )
        return by_rows(self.output_dense, u * ops.squeeze(attended, 2))

    def _project(
        self, inputs: Any, position: Position, positions: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Gates, and encoded queries, keys and values of one head."""
        rows = by_rows(self.input_dense, inputs)
        u, v, z = ops.split(rows, [self.units, 2 * self.units], axis=-1)
        query, key, value = (ops.expand_dims(x, 2) for x in (z, z, v))
        query = position.encode(query * ops.cast(self.query_gamma, z.dtype), positions)
        key = position.encode(key * ops.cast(self.key_gamma, z.dtype), positions)
        return u, query, key, value

    step_patterns = ("attention_mask",)  # see `DecodingAttention`

    def initial_state(self, batch_size: int, max_length: int) -> dict[str, Any]:
        """What `step` needs before the first token: empty caches for so many tokens."""
        return empty_cache(
            batch_size, max_length, 1, self.key_dim, self.units, self.compute_dtype
        )

    def step(
        self,
        inputs: Any,
        state: dict[str, Any],
        valid: Any = None,
        attention_mask: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The next tokens, as in `ProjectedAttention.step`."""
        check_order(self.causal, attention_mask)
        position = self.position or Position()
        at = next_positions(state, ops.shape(inputs)[1])
        u, query, key, value = self._project(inputs, position, at)
        state, key, value, of, seen = extend_cache(
            state, key, value, self.causal, valid, attention_mask
        )
        attended = dot_product_attention(
            log_scaled(query, key, LOG_LENGTH, seen, least=LEAST),
            key,
            value,
            mask=seen,
            position=position,
            positions=(at, of),
        )
        return by_rows(self.output_dense, u * ops.squeeze(attended, 2)), state

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dtype": dtype_config(self),
            "units": self.units,
            "key_dim": self.key_dim,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "position": serialize_unbuilt(self.position),
            "causal": self.causal,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GatedAttentionUnit":
        position = keras.saving.deserialize_keras_object(config["position"])
        return cls(**{**config, "position": position})


@keras.saving.register_keras_serializable(package="keras_ext")
class GatedAttentionBlock(keras.layers.Layer):
    """A post-norm block of a gated attention unit: Norm(x + Dropout(GAU(x))).

    Sublayers: `attention`, the one given, and `attention_norm`.

    Args:
        attention: a `GatedAttentionUnit`.
        dropout: rate of dropout on its output. Default: 0.
        norm: a layer that the block's is made like. Default:
            `LayerNormalization(epsilon=1e-12)`.
        recompute: as of `TransformerBlock`. Default: False.

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        attention_mask, positions: as of the unit. Default: None.

    Example:
        >>> unit = GatedAttentionUnit(units=64, key_dim=16)
        >>> block = GatedAttentionBlock(unit, dropout=0.1, norm=RMSNorm(scale=False))
        >>> tuple(block(keras.ops.zeros((2, 5, 32))).shape)
        (2, 5, 32)

    Reference: kexue.fm/archives/9052.
    """

    def __init__(
        self,
        attention: keras.layers.Layer,
        dropout: float = 0.0,
        norm: keras.layers.Layer | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.recompute = recompute
        self.attention = attention
        self.dropout = dropout
        self.norm_config = norm_config(norm)
        self.attention_norm = named_norm(self.norm_config, "attention_norm", self)
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def build(self, inputs_shape: tuple) -> None:
        self.attention(keras.KerasTensor(inputs_shape, dtype=self.compute_dtype))
        self.attention_norm.build(inputs_shape)

    def call(
        self,
        inputs: Any,
        attention_mask: Any = None,
        positions: Any = None,
        training: bool | None = None,
    ) -> Any:
        given = {"attention_mask": attention_mask, "positions": positions}
        pattern = {name: value for name, value in given.items() if value is not None}

        def run(inputs: Any) -> Any:
            attended = self.attention(inputs, training=training, **pattern)
            attended = self.dropout_layer(attended, training=training)
            return self.attention_norm(inputs + attended)

        if training and self.recompute:
            return backend.recompute(run, (inputs,))
        return run(inputs)

    def step(self, inputs: Any, state: Any, **pattern: Any) -> tuple[Any, Any]:
        """The next tokens, without dropout; see `TransformerBlock.step`."""
        attended, state = self.attention.step(inputs, state, **pattern)
        return self.attention_norm(inputs + attended), state

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "attention": serialize_unbuilt(self.attention),
            "dropout": self.dropout,
            "norm": self.norm_config,
            "recompute": self.recompute,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GatedAttentionBlock":
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("attention", "norm")
        }
        return cls(**{**config, **parts})
