"""Multi-head softmax attention.

    Attention(Q, K, V) = softmax(λ Q Kᵀ) V,    scores of -1e30 where the mask forbids

Exact, in O(n²) time and memory. The softmax runs in float32 at least, whatever the compute
dtype, and a query that may attend to nothing gets zeros instead of the mean of the values.

    plain        λ = 1/√d
    log-n        λ = log_N(n) / √d for n tokens attended to and training length N
    KNA, QNA     K or Q with rows of length 1, λ = 1
    CosA         both, λ = 4 ln(N/2)
    window w     tokens see themselves and the w - 1 before (if not causal, also after) them;
                 O(n w), see `windows.py`
    positions    see `positions.py`, `relative.py`, `rerope.py`

Log-n keeps the entropy of the weights where texts are longer than in training, normalised keys
keep the scores in the range of training: both are for longer texts than a model was trained on.
Neither can be added to a trained model without training it again.

Source: Vaswani et al. 2017, arXiv 1706.03762; kexue.fm/archives/4765; log-n: 8823; KNA, QNA,
CosA: 9859; windows: 9603.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.cache import (
    empty_cache,
    extend_cache,
    next_positions,
    shift_cache,
)
from keras_ext.layers.attention.dot_product import (
    dot_product_attention,
    join_masks,
    log_scaled,
    of_rank_4,
)
from keras_ext.layers.attention.positions import Position, given_positions
from keras_ext.layers.attention.projected import ProjectedAttention
from keras_ext.layers.attention.windows import WindowBlocks
from keras_ext.layers.transformer import serialize_unbuilt
from keras_ext.numerics import cast_up, direction

# Arguments of Keras's attention that this one does not have, and what to do.
ELSEWHERE = {
    "sliding_window": "the same window is window=",
    "use_gate": "heads have no gates, GatedAttentionUnit has them",
}


@keras.saving.register_keras_serializable(package="keras_ext")
class MultiHeadAttention(ProjectedAttention):
    """Softmax attention between learned projections, as in a Transformer.

        head_h = softmax(λ X W_q^h (Y W_k^h)ᵀ) Z W_v^h,    output = [head_1, ..., head_n] W_o

    Takes the arguments of `keras.layers.MultiHeadAttention` and gives what that gives, except
    where no query should be read: one that sees nothing gets heads and scores of zeros, one
    that its own mask hides is treated as any other, and in Keras both get the mean of all
    values, hidden ones included. A mask of rank 2 is refused, as it may be padding or a
    pattern.

    The projections `query_dense`, `key_dense`, `value_dense`, `output_dense` are `Dense`
    layers over the heads side by side, so `enable_lora` and `quantize` work on them: Keras's
    weights fit once their axes of heads and sizes are joined. Without dropout, bias, window,
    returned scores and such positions as change the scores it runs through
    `keras.ops.dot_product_attention`, on a GPU by flash attention.

    Call arguments:
        query: (batch, targets, width).
        value: (batch, sources, value_width).
        key: (batch, sources, key_width). Default: `value`.
        query_mask: the Keras mask of the query, which Keras gives and the output has too. It
            hides nothing: what keys and values are not to be seen, the others say.
        value_mask, key_mask: boolean (batch, sources), True = attend. Default: the Keras masks.
        attention_mask: boolean (batch, targets, sources) or (batch, heads, targets, sources),
            sizes of 1 broadcast; joined with the others. Default: None.
        return_attention_scores: give the output and the weights, (batch, heads, targets,
            sources), as they are before dropout. Default: False.
        use_causal_mask: as `causal`, for this call. Default: False.
        attention_bias: added to the scores, of a shape as `attention_mask`. Default: None.
        positions: where the tokens of self-attention stand, integers (batch, length), for
            `position`. What is causal or in the window, the order of the tokens decides.
            Default: 0 ... length - 1.

    Args:
        num_heads: number of heads.
        key_dim: width of a head's queries and keys.
        value_dim: width of a head's values. Default: `key_dim`.
        dropout: rate of dropout on the attention weights. Default: 0.
        use_bias: of all projections. Default: True.
        output_shape: width of the output. Default: that of the query.
        attention_axes: None or 1: it is over the axis of the tokens. Default: None.
        num_kv_heads: number of heads of keys and values, each for num_heads / num_kv_heads
            heads of queries. Default: `num_heads`.
        causal: tokens see no later ones. Default: False.
        window: w, see above; for self-attention. Default: None, all.
        position: a `RotaryPosition`, `ReRoPE`, `RelativePosition` or `T5Bias`. Default: none.
        query_norm, key_norm: give queries, keys the length 1. Default: False.
        scale: λ. Default: 1 if one of them is normalised, else 1/√key_dim.
        log_length: N of the log-n scaling, which multiplies λ by log_N(n). Default: None, off.
        flash_attention: as of `keras.ops.dot_product_attention`: True fails where it is
            impossible. Default: None, where possible.
        query_initializer, output_initializer: of the kernels of the queries and of the output.
            Default: `kernel_initializer`.
        seed: of the dropout. Default: a random one.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint: of all projections, as
            for `Dense`. Default: "glorot_uniform", "zeros", none.

    Raises:
        ValueError: a number is not positive, `num_kv_heads` does not divide `num_heads`,
            rotary positions have an odd `key_dim`, both norms come without a `scale`,
            `output_shape` or `attention_axes` has several axes, an option of biases comes
            without biases, or `flash_attention=True` with what makes it impossible. When
            built: the position is in another attention. In a call: a mask or a bias of another
            rank; a window comes with one, with returned scores, or with another length of the
            sources; positions come without a `position`, or are not integers (batch, length).

    Example:
        >>> attention = MultiHeadAttention(4, 8, causal=True, position=RotaryPosition())
        >>> x = keras.random.normal((2, 5, 32))
        >>> tuple(attention(x, x).shape)
        (2, 5, 32)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        window: int | None = None,
        position: Position | None = None,
        query_norm: bool = False,
        key_norm: bool = False,
        scale: float | None = None,
        log_length: int | None = None,
        flash_attention: bool | None = None,
        query_initializer: Any = None,
        output_initializer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, instead in ELSEWHERE.items():
            if given := kwargs.pop(name, None):
                raise ValueError(f"{name}={given} is not taken here: {instead}.")
        super().__init__(
            num_heads,
            key_dim,
            value_dim,
            num_kv_heads,
            causal,
            use_bias,
            output_shape,
            **kwargs,
        )
        axes = (attention_axes,) if isinstance(attention_axes, int) else attention_axes
        if axes is not None and tuple(axes) not in ((1,), (-2,)):
            raise ValueError(
                f"attention_axes must be None or 1, got {attention_axes}: inputs are (batch, "
                "length, width), of which the length is attended over."
            )
        self.query_initializer = keras.initializers.get(query_initializer)
        if self.query_initializer is not None:
            self.query_dense.kernel_initializer = self.query_initializer.clone()
        self.output_initializer = keras.initializers.get(output_initializer)
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        if log_length is not None and log_length < 2:
            raise ValueError(f"log_length must be at least 2, got {log_length}.")
        if query_norm and key_norm and scale is None:
            raise ValueError(
                "scale must be given where queries and keys are normalised: 4 ln(N/2) for the "
                "training length N."
            )
        if position is not None and key_dim % position.key_dim_multiple:
            raise ValueError(
                f"key_dim must be a multiple of {position.key_dim_multiple} for "
                f"{type(position).__name__}, got {key_dim}."
            )
        self.dropout = dropout
        self.window = window
        self.position = position
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.scale = scale
        self.log_length = log_length
        self.flash_attention = flash_attention
        self._refuse_flash_attention_with(
            {
                f"dropout={dropout}": dropout > 0,
                f"window={window}": window is not None,
                f"position={type(position).__name__}": not (position or Position).only_encodes,
                f"value_dim={self.value_dim} beside key_dim={key_dim}": key_dim
                != self.value_dim,
            }
        )
        self.seed = seed
        self.dropout_layer = keras.layers.Dropout(
            dropout, seed=seed, name="dropout", dtype=self.dtype_policy
        )

    def _refuse_flash_attention_with(self, obstacles: dict[str, bool]) -> None:
        for obstacle, present in obstacles.items():
            if self.flash_attention and present:
                raise ValueError(
                    f"flash_attention=True is impossible with {obstacle}: leave out one of "
                    "them."
                )

    def build(
        self, query_shape: tuple, value_shape: tuple, key_shape: tuple | None = None
    ) -> None:
        super().build(query_shape, value_shape, key_shape)
        if isinstance(self.position, keras.layers.Layer):
            if self.position.built:
                raise ValueError(
                    f"position={self.position.name!r} has weights for one attention, and is in "
                    f"another already. Give each a {type(self.position).__name__} of its own."
                )
            heads = (*query_shape[:-1], self.num_heads)
            self.position.build((*heads, self.key_dim), (*heads, self.value_dim))

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        source_mask: Any,
        attention_mask: Any,
        attention_bias: Any,
        causal: bool,
        training: bool | None,
        positions: Any = None,
        return_scores: bool = False,
    ) -> Any:
        self._refuse_flash_attention_with(
            {
                "attention_bias": attention_bias is not None,
                "return_attention_scores=True": return_scores,
            }
        )
        if positions is not None:
            positions = given_positions(positions, self.position, query, key)
        position = self.position or Position()
        if training:
            position = position.in_training()
        if position.needs_causal and not causal:
            raise ValueError(f"{type(position).__name__} needs causal=True.")
        query, key = self._normalise(query, key)
        sizes = ops.shape(query)[1], ops.shape(key)[1]
        if self.window is None:
            mask = join_masks(source_mask, attention_mask)
            at, of = (ops.arange(size) for size in sizes)
            if positions is not None:
                at = of = positions
        else:
            if attention_mask is not None or attention_bias is not None:
                raise ValueError("A window takes no attention_mask or attention_bias.")
            if return_scores:
                raise ValueError(
                    f"With window={self.window} the scores of most pairs are not computed: "
                    "leave return_attention_scores out."
                )
            if query.shape[1] != key.shape[1]:
                raise ValueError(
                    f"A window needs as many targets as sources, got {query.shape[1]} and "
                    f"{key.shape[1]}."
                )
            blocks = WindowBlocks(sizes[0], self.window, causal)
            if source_mask is None:
                source_mask = ops.ones(ops.shape(key)[:2], "bool")
            query = blocks.of_queries(query)
            key, value = blocks.of_keys(key), blocks.of_keys(value)
            mask, causal = blocks.mask(source_mask), False
            at, of = blocks.query_positions, blocks.key_positions
            if positions is not None:
                at, of = blocks.of_queries(positions), blocks.of_keys(positions)
        attended = self._dot_product(
            position.encode(query, at),
            position.encode(key, of),
            value,
            mask=mask,
            causal=causal,
            bias=None
            if attention_bias is None
            else of_rank_4("attention_bias", attention_bias),
            position=position,
            positions=(at, of),
            dropout=(lambda w: self.dropout_layer(w, training=True))
            if training and self.dropout
            else None,
            flash_attention=self.flash_attention,
            return_scores=return_scores,
        )
        return attended if self.window is None else blocks.joined(attended)

    def _normalise(self, query: Any, key: Any) -> tuple[Any, Any]:
        return (
            _direction(query) if self.query_norm else query,
            _direction(key) if self.key_norm else key,
        )

    def _dot_product(
        self, query: Any, key: Any, value: Any, mask: Any, causal: bool, **kwargs: Any
    ) -> Any:
        scale = self.scale
        if scale is None and (self.query_norm or self.key_norm):
            scale = 1.0
        if self.log_length is not None:
            query = log_scaled(query, key, self.log_length, mask, causal)
        return dot_product_attention(
            query,
            self.for_all_heads(key),
            self.for_all_heads(value),
            mask=mask,
            scale=scale,
            causal=causal,
            **kwargs,
        )

    @property
    def step_patterns(self) -> tuple[str, ...]:
        return ("attention_mask", "attention_bias") if self.window is None else ()

    def initial_state(self, batch_size: int, max_length: int | None = None) -> dict[str, Any]:
        """What `step` needs before the first token: empty caches of keys and values.

        Args:
            batch_size: of the inputs.
            max_length: number of tokens that are kept: once more came, the oldest are
                forgotten. With a window w it is w - 1, whatever this is.
        """
        size = max_length if self.window is None else self.window - 1
        if size is None:
            raise ValueError("max_length must be given without a window, got None.")
        return empty_cache(
            batch_size,
            size,
            self.num_kv_heads,
            self.key_dim,
            self.value_dim,
            self.compute_dtype,
        )

    def attend_step(
        self,
        query: Any,
        key: Any,
        value: Any,
        state: dict[str, Any],
        valid: Any,
        attention_mask: Any,
        attention_bias: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Heads of the next tokens; without a window they have to fit into the empty places."""
        position = self.position or Position()
        query, key = self._normalise(query, key)
        at = next_positions(state, ops.shape(query)[1])
        query, key = position.encode(query, at), position.encode(key, at)
        if self.window is not None:
            if attention_mask is not None or attention_bias is not None:
                raise ValueError("A window takes no attention_mask or attention_bias.")
            return self._window_step(query, key, value, state, valid, at)
        state, key, value, of, mask = extend_cache(
            state, key, value, self.causal, valid, attention_mask
        )
        heads = self._dot_product(
            query,
            key,
            value,
            mask,
            causal=False,
            bias=attention_bias,
            position=position,
            positions=(at, of),
        )
        return heads, state

    def _window_step(
        self, query: Any, key: Any, value: Any, state: dict[str, Any], valid: Any, at: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Heads of the next tokens, which see those kept and each other within the window."""
        number, kept = ops.shape(query)[1], ops.shape(state["valid"])[1]
        state, key, value, valid = shift_cache(state, key, value, valid)
        options: dict[str, Any] = {"causal": False, "position": self.position or Position()}
        if query.shape[1] == 1:  # it sees all of them
            positions, mask = (at, at - ops.arange(kept, -1, -1)), valid[:, None, None]
            heads = self._dot_product(query, key, value, mask, positions=positions, **options)
            return heads, state
        # As in `attend`; the queries that those kept would have are zeros, and not wanted.
        blocks = WindowBlocks(kept + number, kept + 1, causal=True)
        query = ops.pad(query, [(0, 0), (kept, 0), (0, 0), (0, 0)])
        heads = self._dot_product(
            blocks.of_queries(query),
            blocks.of_keys(key),
            blocks.of_keys(value),
            blocks.mask(valid),
            positions=(blocks.query_positions, blocks.key_positions),
            **options,
        )
        return blocks.joined(heads)[:, kept:], state

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dropout": self.dropout,
            "window": self.window,
            "position": serialize_unbuilt(self.position),
            "query_norm": self.query_norm,
            "key_norm": self.key_norm,
            "scale": self.scale,
            "log_length": self.log_length,
            "flash_attention": self.flash_attention,
            "query_initializer": keras.initializers.serialize(self.query_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MultiHeadAttention":
        position = keras.saving.deserialize_keras_object(config["position"])
        return cls(**{**config, "position": position})


def _direction(x: Any) -> Any:
    return ops.cast(direction(cast_up(x)), x.dtype)
