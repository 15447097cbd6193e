"""The Transformer block and its position-wise feed-forward layer.

    post-norm (the original, BERT, GPT)         pre-norm (GPT-2, T5)
    h = Norm(x + Dropout(Attention(x, x)))      h = x + Dropout(Attention(n, n)), n = Norm(x)
    y = Norm(h + Dropout(FeedForward(h)))       y = h + Dropout(FeedForward(Norm(h)))

The block of a decoder has an attention to a memory between the two, of the same form. The last
pre-norm block needs a norm after it.

Source: Vaswani et al. 2017, arXiv 1706.03762; kexue.fm/archives/8620, 9009 (pre or post).
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.every import dtype_config, sublayer_dtype
from keras_ext.layers.rows import by_rows


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
def gelu_erf(x: Any) -> Any:
    """The exact GELU, as an operation that ONNX has too.

        x/2 · (1 + erf(x/√2))

    On TensorFlow Keras takes erfc for it, from which tf2onnx makes a file that nothing runs.
    Below float32, where 1 + erf loses digits and no ONNX is written, it is Keras's.

    Example:
        >>> layer = keras.layers.Dense(8, activation=gelu_erf)

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415.
    """
    x = ops.convert_to_tensor(x)
    single = keras.backend.standardize_dtype(x.dtype) == "float32"
    if keras.backend.backend() != "tensorflow" or not single:
        return keras.activations.gelu(x, approximate=False)
    return x / 2 * (1 + ops.erf(x * 2**-0.5))


@keras.saving.register_keras_serializable(package="keras_ext")
class FeedForward(keras.layers.Layer):
    """Two dense layers at every position; the output has the width of the input.

        y = activation(x W₁ + b₁) W₂ + b₂
        y = (activation(x W₁ + b₁) ⊙ (x V + c)) W₂ + b₂    if gated

    Sublayers: `intermediate_dense` (W₁), `linear_dense` (V), `output_dense` (W₂).

    Args:
        units: width between the two layers.
        activation: of the first layer. Default: `gelu_erf`.
        kernel_initializer: of all layers. Default: "glorot_uniform".
        output_initializer: of W₂ instead. Default: `kernel_initializer`.
        use_bias: of all layers. Default: True.
        gated: multiply by a second product of the input. Default: False.
        dropout: rate of dropout before W₂. Default: 0.

    Call arguments:
        inputs: (..., width). The output is like it.

    Example:
        >>> tuple(FeedForward(units=64)(keras.ops.zeros((2, 5, 16))).shape)
        (2, 5, 16)

    Reference: gates: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(
        self,
        units: int,
        activation: Any = gelu_erf,
        kernel_initializer: Any = "glorot_uniform",
        use_bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
        output_initializer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = units
        self.output_initializer = keras.initializers.get(output_initializer)
        self.use_bias = use_bias
        self.gated = gated
        self.dropout = dropout
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.intermediate_dense = self._dense("intermediate_dense", units, self.activation)
        if gated:
            self.linear_dense = self._dense("linear_dense", units)
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def _dense(self, name: str, units: int, activation: Any = None) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            name=name,
            dtype=sublayer_dtype(self, name),
        )

    def build(self, inputs_shape: tuple) -> None:
        self.output_dense = self._dense("output_dense", inputs_shape[-1])
        if self.output_initializer is not None:
            self.output_dense.kernel_initializer = self.output_initializer.clone()
        self.intermediate_dense.build(inputs_shape)
        if self.gated:
            self.linear_dense.build(inputs_shape)
        self.output_dense.build((*inputs_shape[:-1], self.units))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = by_rows(self.intermediate_dense, inputs)
        if self.gated:
            x = x * by_rows(self.linear_dense, inputs)
        return by_rows(self.output_dense, self.dropout_layer(x, training=training))

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dtype": dtype_config(self),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "use_bias": self.use_bias,
            "gated": self.gated,
            "dropout": self.dropout,
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class TransformerBlock(keras.layers.Layer):
    """A Transformer block around any attention, feed-forward and norm.

    Sublayers: those given, `attention_norm`, `feed_forward_norm` and, with a cross attention,
    `cross_attention_norm`.

    Args:
        attention: layer called as `attention(x, memory)`, with `attention_mask=`,
            `attention_bias=` and `positions=` where the block is; it finds the padding as the
            Keras mask of the memory.
        feed_forward: layer called as `feed_forward(h)`.
        dropout: rate of dropout on the output of either. Default: 0.
        norm: what normalises, a layer that those of the block are made like. Default:
            `LayerNormalization(epsilon=1e-12)`.
        pre_norm: normalise what enters the sublayers, not the sums. Default: False.
        cross_attention: layer called as `cross_attention(h, memory)` between the two. Default:
            none.
        recompute: in training keep only what enters the block, and compute the rest again for
            the gradient, on the same draws (gradient checkpointing). Memory is saved on
            TensorFlow without XLA and on PyTorch; on a CPU, XLA computes again but keeps all.
            Default: False.

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        attention_mask: boolean, passed to `attention`; True = attend. Default: None.
        memory: what `cross_attention` attends to, (batch, sources, width); without one it is
            what `attention` attends to. Default: x itself.
        condition: passed to the norms, such as `ConditionalLayerNormalization`. Default: None.
        attention_bias: passed to `attention`. Default: None.
        positions: where the tokens stand, integers (batch, length), passed to `attention`.
            Default: None.

    Raises:
        ValueError: a block with a cross attention is called without memory.

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
        pre_norm: bool = False,
        cross_attention: keras.layers.Layer | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.attention = attention
        self.feed_forward = feed_forward
        self.cross_attention = cross_attention
        self.dropout = dropout
        self.pre_norm = pre_norm
        self.recompute = recompute
        self.norm_config = norm_config(norm)
        self.attention_norm = named_norm(self.norm_config, "attention_norm", self)
        self.feed_forward_norm = named_norm(self.norm_config, "feed_forward_norm", self)
        if cross_attention is not None:
            self.cross_attention_norm = named_norm(
                self.norm_config, "cross_attention_norm", self
            )
        self.dropout_layer = keras.layers.Dropout(
            dropout, name="dropout", dtype=self.dtype_policy
        )

    def build(
        self,
        inputs_shape: tuple,
        memory_shape: tuple | None = None,
        condition_shape: tuple | None = None,
    ) -> None:
        inputs = keras.KerasTensor(inputs_shape, dtype=self.compute_dtype)
        self.attention(inputs, inputs)  # a call builds any layer, whatever its `build` takes
        self.feed_forward(inputs)
        norms = [self.attention_norm, self.feed_forward_norm]
        if self.cross_attention is not None:
            if memory_shape is None:
                raise ValueError(f"{self.name} has a cross attention: give it memory=.")
            memory = keras.KerasTensor(memory_shape, dtype=self.compute_dtype)
            self.cross_attention(inputs, memory)
            norms.append(self.cross_attention_norm)
        for norm in norms:
            norm.build(inputs_shape, *(() if condition_shape is None else (condition_shape,)))

    def call(
        self,
        inputs: Any,
        attention_mask: Any = None,
        memory: Any = None,
        condition: Any = None,
        attention_bias: Any = None,
        positions: Any = None,
        training: bool | None = None,
    ) -> Any:
        def run(inputs: Any, memory: Any, condition: Any, attention_bias: Any) -> Any:
            given = {
                "attention_mask": attention_mask,
                "attention_bias": attention_bias,
                "positions": positions,
            }
            pattern = {name: value for name, value in given.items() if value is not None}
            return self._run(inputs, memory, condition, pattern, training)

        tensors = inputs, memory, condition, attention_bias
        if training and self.recompute:
            return backend.recompute(run, tensors)
        return run(*tensors)

    def _run(
        self,
        inputs: Any,
        memory: Any,
        condition: Any,
        pattern: dict[str, Any],
        training: bool | None,
    ) -> Any:
        def attend(x: Any) -> Any:
            own = memory is None or self.cross_attention is not None
            return self.attention(x, x if own else memory, training=training, **pattern)

        def cross_attend(cross_attention: keras.layers.Layer, x: Any) -> Any:
            return cross_attention(x, memory, training=training)

        # `training` is said to all, as the gradient runs this again outside of the call.
        return self._sublayers(inputs, attend, cross_attend, condition, training)

    def step(
        self,
        inputs: Any,
        state: Any,
        memory: Any = None,
        memory_mask: Any = None,
        condition: Any = None,
        **pattern: Any,
    ) -> tuple[Any, Any]:
        """The next tokens, of an attention that is a `DecodingAttention`; no dropout.

        Args:
            inputs: (batch, tokens, width).
            state: of `attention.initial_state`, or of the step before.
            memory: of `cross_attention.remember`, where the block has one.
            memory_mask: boolean (batch, sources), of the memory. Default: None.
            condition: as in a call. Default: None.
            **pattern: passed to `attention.step`.

        Returns: the outputs, like `inputs`, and the new state.
        """
        new = []

        def attend(x: Any) -> Any:
            attended, after = self.attention.step(x, state, **pattern)
            new.append(after)
            return attended

        def recall(cross_attention: keras.layers.Layer, x: Any) -> Any:
            return cross_attention.recall(x, memory, memory_mask)

        return self._sublayers(inputs, attend, recall, condition, training=False), new[0]

    def _sublayers(
        self, x: Any, attend: Any, cross_attend: Any, condition: Any, training: bool | None
    ) -> Any:
        given = () if condition is None else (condition,)

        def add(x: Any, norm: keras.layers.Layer, sublayer: Any) -> Any:
            if self.pre_norm:
                return x + self.dropout_layer(sublayer(norm(x, *given)), training=training)
            return norm(x + self.dropout_layer(sublayer(x), training=training), *given)

        x = add(x, self.attention_norm, attend)
        cross_attention = self.cross_attention
        if cross_attention is not None:
            x = add(x, self.cross_attention_norm, lambda x: cross_attend(cross_attention, x))
        return add(x, self.feed_forward_norm, lambda x: self.feed_forward(x, training=training))

    def compute_output_shape(
        self,
        inputs_shape: tuple,
        memory_shape: tuple | None = None,
        condition_shape: tuple | None = None,
    ) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "attention": serialize_unbuilt(self.attention),
            "feed_forward": serialize_unbuilt(self.feed_forward),
            "dropout": self.dropout,
            "norm": self.norm_config,
            "pre_norm": self.pre_norm,
            "cross_attention": serialize_unbuilt(self.cross_attention),
            "recompute": self.recompute,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerBlock":
        layers = ("attention", "feed_forward", "norm", "cross_attention")
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
