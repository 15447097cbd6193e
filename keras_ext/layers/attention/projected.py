"""What all attention layers share: projections, heads, one signature, decoding token by token.

    head_h = attend(X W_q^h, Y W_k^h, Z W_v^h),    output = [head_1, ..., head_n] W_o

Only `attend` differs. With fewer heads of keys and values than of queries (grouped heads), each
serves as many neighbouring heads of queries.

Source: Vaswani et al. 2017, arXiv 1706.03762; grouped heads: Ainslie et al. 2023, arXiv
2305.13245.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext.arguments import integer
from keras_ext.layers.attention.decoding import check_order
from keras_ext.layers.every import dtype_config, sublayer_dtype
from keras_ext.layers.rows import by_rows


class ProjectedAttention(keras.layers.Layer):
    """Base class: an attention between learned projections.

    A subclass defines `attend`, and to be a `DecodingAttention` `initial_state` and
    `attend_step(query, key, value, state, valid, attention_mask, attention_bias)`, which gives
    heads and the new state. Queries are (batch, targets, heads, key_dim), keys (batch, sources,
    num_kv_heads, key_dim), values (batch, sources, num_kv_heads, value_dim), `source_mask` is
    boolean (batch, sources) or None; the result is (batch, targets, heads, value_dim), and with
    `return_scores` the scores after it.

    Arguments that all attentions share, with the names and defaults of Keras:
        use_bias: of all projections. Default: True.
        output_shape: width of the output. Default: that of the query.
        kernel_initializer, bias_initializer: of all projections, each with draws of its own.
            Default: "glorot_uniform", "zeros".
        kernel_regularizer, bias_regularizer, activity_regularizer: of all projections and what
            they give. Default: none.
        kernel_constraint, bias_constraint: of all projections. Default: none.

    All of them see a kernel as the matrix (inputs, units) of a `Dense`, with the heads side by
    side, where Keras has an axis of heads.

    Raises:
        ValueError: a number is not positive, `num_kv_heads` does not divide `num_heads`,
            `output_shape` has several axes, or a bias that is not used has an option.
    """

    output_initializer: Any = None  # of the kernel of the output, where it has one of its own

    @property
    def step_patterns(self) -> tuple[str, ...]:
        """See `DecodingAttention`."""
        return ()

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        causal: bool = False,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True  # the output keeps the mask of the query
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = key_dim if value_dim is None else value_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name in ("num_heads", "key_dim", "value_dim", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}."
            )
        self.causal = causal
        self.use_bias = use_bias
        self.output_width = _width(output_shape)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.regularizers = {
            "kernel_regularizer": keras.regularizers.get(kernel_regularizer),
            "bias_regularizer": keras.regularizers.get(bias_regularizer),
            "activity_regularizer": keras.regularizers.get(activity_regularizer),
        }
        self.constraints = {
            "kernel_constraint": keras.constraints.get(kernel_constraint),
            "bias_constraint": keras.constraints.get(bias_constraint),
        }
        if not use_bias:
            self._refuse_options_of_biases()
        self.query_dense = self._projection("query_dense", num_heads * key_dim)
        self.key_dense = self._projection("key_dense", self.num_kv_heads * key_dim)
        self.value_dense = self._projection("value_dense", self.num_kv_heads * self.value_dim)

    def _refuse_options_of_biases(self) -> None:
        start = self.bias_initializer
        options = {
            "bias_initializer": None if isinstance(start, keras.initializers.Zeros) else start,
            "bias_regularizer": self.regularizers["bias_regularizer"],
            "bias_constraint": self.constraints["bias_constraint"],
        }
        for name, option in options.items():
            if option is not None:
                raise ValueError(
                    f"{name}={option} has no effect with use_bias=False: leave it out."
                )

    def _projection(self, name: str, units: int) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            **self.regularizers,
            **self.constraints,
            name=name,
            dtype=sublayer_dtype(self, name),
        )

    def build(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> None:
        width = self.output_width or query_shape[-1]
        self.output_dense = self._projection("output_dense", width)
        if self.output_initializer is not None:
            self.output_dense.kernel_initializer = self.output_initializer.clone()
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape or value_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:-1], self.num_heads * self.value_dim))

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,  # Keras hands it on to the output; what is hidden is not read
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
        positions: Any = None,
    ) -> Any:
        if key_mask is not None and value_mask is not None:
            value_mask = ops.logical_and(value_mask, key_mask)
        attended = self.attend(
            *self._project(query, value if key is None else key, value),
            source_mask=key_mask if value_mask is None else value_mask,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            causal=self.causal or use_causal_mask,
            training=training,
            positions=positions,
            return_scores=return_attention_scores,
        )
        if not return_attention_scores:
            return self._merge(attended)
        heads, scores = attended
        return self._merge(heads), scores

    def step(
        self,
        inputs: Any,
        state: Any,
        valid: Any = None,
        attention_mask: Any = None,
        attention_bias: Any = None,
    ) -> tuple[Any, Any]:
        """The next tokens of causal self-attention, at a cost that `state` bounds.

        Args:
            inputs: (batch, tokens, width).
            state: of `initial_state`, or of the step before.
            valid: boolean (batch, tokens), False at the padding before the texts. Default:
                None, there is none.
            attention_mask: boolean (batch, tokens, tokens), what the next tokens see of each
                other; it tells their order if not `causal`. Default: None.
            attention_bias: added to the scores, (batch, heads, tokens, max_length). Default:
                None.

        Returns: the outputs, like `inputs`, and the new state.

        Raises:
            ValueError: the layer is not causal, and there is no mask; or one or a bias is not
                among its `step_patterns`.
        """
        check_order(self.causal, attention_mask)
        if not self.built:
            self.build(inputs.shape, inputs.shape)
        heads, state = self.attend_step(
            *self._project(inputs, inputs, inputs),
            state,
            valid=valid,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
        )
        return self._merge(heads), state

    def remember(self, memory: Any) -> tuple[Any, Any]:
        """Keys and values of a memory (batch, sources, width), for `recall`."""
        return (
            by_rows(self.key_dense, memory, split=(self.num_kv_heads, self.key_dim)),
            by_rows(self.value_dense, memory, split=(self.num_kv_heads, self.value_dim)),
        )

    def recall(self, query: Any, memory: tuple[Any, Any], mask: Any = None) -> Any:
        """Attention of (batch, targets, width) to a memory, of `remember`.

        Args:
            mask: boolean (batch, sources), True = attend. Default: None, all.
        """
        heads = self.attend(
            self._queries(query),
            *memory,
            source_mask=mask,
            attention_mask=None,
            attention_bias=None,
            causal=False,
            training=False,
        )
        return self._merge(heads)

    def _project(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        return (
            self._queries(query),
            by_rows(self.key_dense, key, split=(self.num_kv_heads, self.key_dim)),
            by_rows(self.value_dense, value, split=(self.num_kv_heads, self.value_dim)),
        )

    def _queries(self, query: Any) -> Any:
        return by_rows(self.query_dense, query, split=(self.num_heads, self.key_dim))

    def _merge(self, heads: Any) -> Any:
        return by_rows(self.output_dense, heads, joined=2)

    def for_all_heads(self, x: Any) -> Any:
        """Keys or values, each as often as heads of queries share it."""
        shared = self.num_heads // self.num_kv_heads
        return x if shared == 1 else ops.repeat(x, shared, axis=2)

    def compute_output_shape(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> tuple:
        return (*query_shape[:-1], self.output_width or query_shape[-1])

    def compute_output_spec(self, query: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().compute_output_spec(query, value, *args, **kwargs)
        call = inspect.signature(self.call).bind(query, value, *args, **kwargs)
        if not call.arguments.get("return_attention_scores"):
            return output
        scores = (query.shape[0], self.num_heads, query.shape[1], value.shape[1])
        return output, keras.KerasTensor(scores, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dtype": dtype_config(self),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_kv_heads": self.num_kv_heads,
            "causal": self.causal,
            "use_bias": self.use_bias,
            "output_shape": self.output_width,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            **{k: keras.regularizers.serialize(v) for k, v in self.regularizers.items()},
            **{k: keras.constraints.serialize(v) for k, v in self.constraints.items()},
        }


def _width(output_shape: int | Sequence[int] | None) -> int | None:
    """Of an output (batch, targets, width)."""
    if output_shape is None:
        return None
    axes = output_shape if isinstance(output_shape, Sequence) else (output_shape,)
    if len(axes) != 1:
        raise ValueError(
            f"output_shape must be one width, got {output_shape}: the output is (batch, "
            "targets, width), and a Reshape layer may split the width."
        )
    return integer("output_shape", axes[0])
