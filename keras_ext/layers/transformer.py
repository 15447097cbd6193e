"""The Transformer block and its position-wise feed-forward layer.

    h = LayerNorm(x + Dropout(Attention(x, x)))
    y = LayerNorm(h + Dropout(FeedForward(h)))

This is the post-norm form of the original Transformer and of BERT.

Source: Vaswani et al. 2017, arXiv 1706.03762; kexue.fm/archives/8620.
"""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_ext")
def gelu_tanh(x: Any) -> Any:
    """The tanh approximation of GELU, off the exact one by up to 5e-4.

        x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))

    Example:
        >>> layer = keras.layers.Dense(8, activation=gelu_tanh)

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415.
    """
    return keras.activations.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="keras_ext")
class FeedForward(keras.layers.Layer):
    """Two dense layers at every position; the output has the width of the input.

        y = activation(x W₁ + b₁) W₂ + b₂

    Args:
        units: width between the two layers.
        activation: of the first layer. Default: "gelu" (exact, by erf).
        kernel_initializer: of both layers. Default: "glorot_uniform".
        use_bias: of both layers. Default: True.

    Call arguments:
        inputs: (..., width). The output is like it.

    Example:
        >>> tuple(FeedForward(units=64)(keras.ops.zeros((2, 5, 16))).shape)
        (2, 5, 16)
    """

    def __init__(
        self,
        units: int,
        activation: Any = "gelu",
        kernel_initializer: Any = "glorot_uniform",
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = units
        self.use_bias = use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.intermediate_dense = self._dense("intermediate_dense", units, self.activation)

    def _dense(self, name: str, units: int, activation: Any = None) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            name=name,
            dtype=self.dtype_policy,
        )

    def build(self, inputs_shape: tuple) -> None:
        self.output_dense = self._dense("output_dense", inputs_shape[-1])
        self.intermediate_dense.build(inputs_shape)
        self.output_dense.build((*inputs_shape[:-1], self.units))

    def call(self, inputs: Any) -> Any:
        return self.output_dense(self.intermediate_dense(inputs))

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class TransformerBlock(keras.layers.Layer):
    """A post-norm Transformer block around any attention, feed-forward and norm.

    Sublayers: those given, `attention_norm` and `feed_forward_norm`.

    Args:
        attention: layer called as `attention(x, memory)`, with `attention_mask=` where the
            block is; it finds the padding as the Keras mask of the memory.
        feed_forward: layer called as `feed_forward(h)`.
        dropout: rate of dropout on the output of either. Default: 0.
        norm: what normalises after either, a layer that two are made like. Default:
            `LayerNormalization(epsilon=1e-12)`.

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        attention_mask: boolean, passed to `attention`; True = attend. Default: None.
        memory: what x attends to, (batch, sources, width). Default: x itself.
        condition: passed to both norms, such as `ConditionalLayerNormalization`. Default: None.

    Example:
        >>> block = TransformerBlock(MultiHeadAttention(4, 8), FeedForward(64), dropout=0.1)
        >>> tuple(block(keras.ops.zeros((2, 5, 32))).shape)
        (2, 5, 32)
    """

    def __init__(
        self,
        attention: keras.layers.Layer,
        feed_forward: keras.layers.Layer,
        dropout: float = 0.0,
        norm: keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.attention = attention
        self.feed_forward = feed_forward
        self.dropout = dropout
        self.norm_config = norm_config(norm)
        self.attention_norm = named_norm(self.norm_config, "attention_norm", self)
        self.feed_forward_norm = named_norm(self.norm_config, "feed_forward_norm", self)
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def build(self, inputs_shape: tuple, condition_shape: tuple | None = None) -> None:
        inputs = keras.KerasTensor(inputs_shape, dtype=self.compute_dtype)
        self.attention(inputs, inputs)  # a call builds any layer, whatever its `build` takes
        self.feed_forward(inputs)
        condition = () if condition_shape is None else (condition_shape,)
        self.attention_norm.build(inputs_shape, *condition)
        self.feed_forward_norm.build(inputs_shape, *condition)

    def call(
        self,
        inputs: Any,
        attention_mask: Any = None,
        memory: Any = None,
        condition: Any = None,
        training: bool | None = None,
    ) -> Any:
        pattern = {} if attention_mask is None else {"attention_mask": attention_mask}
        attended = self.attention(inputs, inputs if memory is None else memory, **pattern)
        return self._after_attention(inputs, attended, training, condition)

    def step(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """One token more, (batch, 1, width), after a causal attention; no dropout.

        Args:
            inputs: (batch, 1, width).
            state: of `attention.initial_state`, or of the step before.

        Returns: the output (batch, 1, width) and the new state.
        """
        attended, state = self.attention.step(inputs, state)
        return self._after_attention(inputs, attended, training=False), state

    def _after_attention(
        self, inputs: Any, attended: Any, training: bool | None, condition: Any = None
    ) -> Any:
        given = () if condition is None else (condition,)
        x = inputs + self.dropout_layer(attended, training=training)
        x = self.attention_norm(x, *given)
        y = x + self.dropout_layer(self.feed_forward(x), training=training)
        return self.feed_forward_norm(y, *given)

    def compute_output_shape(
        self, inputs_shape: tuple, condition_shape: tuple | None = None
    ) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "attention": serialize_unbuilt(self.attention),
            "feed_forward": serialize_unbuilt(self.feed_forward),
            "dropout": self.dropout,
            "norm": self.norm_config,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerBlock":
        layers = ("attention", "feed_forward", "norm")
        built = {name: keras.saving.deserialize_keras_object(config[name]) for name in layers}
        return cls(**{**config, **built})


def serialize_unbuilt(part: Any) -> Any:
    # Rebuilt by the layer around it, its weights get that one's name in their paths, which
    # checkpoint tables rely on; rebuilt by itself, they would not.
    config = keras.saving.serialize_keras_object(part)
    return config and {key: value for key, value in config.items() if key != "build_config"}


def norm_config(norm: keras.layers.Layer | None) -> dict[str, Any]:
    """What `named_norm` makes layers of: the layer serialised, BERT's where there is none."""
    config = serialize_unbuilt(norm or keras.layers.LayerNormalization(epsilon=1e-12))
    # While it loads a model, Keras marks what it takes for one and the same object; here it
    # would be two norms, or those of another block.
    return {key: value for key, value in config.items() if key != "shared_object_id"}


def named_norm(
    config: dict[str, Any], name: str, parent: keras.layers.Layer
) -> keras.layers.Layer:
    """A layer of this configuration, with a name and its parent's dtype."""
    dtype = keras.dtype_policies.serialize(parent.dtype_policy)
    named = {**config["config"], "name": name, "dtype": dtype}
    return keras.saving.deserialize_keras_object({**config, "config": named})
