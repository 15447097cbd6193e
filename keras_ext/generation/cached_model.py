"""Language models token by token: keys and values of the tokens before are kept.

    logits, states = step(tokens, states),    equal to those of the whole text

A step costs O(t (n + w)) for t new tokens after at most n, where the whole text again would
cost O((n + t) (n + t + w)), w being the width. Exact but for rounding.

The graph of the model is built again on its own layers, which keep their weights: blocks and
positions are called by what they do for the next tokens, all other layers treat tokens one by
one and are called as they are. So whatever `build_transformer_model` and surgery make can
generate, if no token sees later ones that are yet to come.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_ext import layers
from keras_ext.layers import PrefixMask
from keras_ext.numerics import at_least_float32


class CachedModel:
    """The next logits of a language model, with a cache.

    Texts of a batch end together: shorter ones have padding before them, which `valid` marks
    and no token sees.

    Args:
        model: functional, of `build_transformer_model`: a language model or UniLM
            (`application`) or a sequence-to-sequence model, with its logits (`with_mlm`).

    Attributes:
        max_length: tokens that the model has positions for, None for any number.
        vocab_size: of its logits.
        masks_zero: whether token 0 is padding, which the model never sees.
        has_prefix: whether it is a UniLM.
        has_memory: whether it has an encoder.

    Raises:
        ValueError: the model has no logits, or not only earlier tokens are seen.

    Example:
        >>> sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
        >>> gpt2 = build_transformer_model(sizes, model="gpt2", with_mlm=True)
        >>> cached = CachedModel(gpt2)
        >>> states = cached.initial_states(batch_size=1, size=16)
        >>> logits, states = cached.step(np.array([[5, 3]]), np.ones((1, 16), "bool"), states)
        >>> logits, states = cached.step(np.array([[8]]), np.ones((1, 16), "bool"), states)
        >>> tuple(logits.shape)
        (1, 100)
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        embedding = model.get_layer("token_embedding")
        self.vocab_size, self.masks_zero = embedding.input_dim, embedding.mask_zero
        logits = [x for x in model.outputs if x.shape[-1] == self.vocab_size]
        if len(logits) != 1:
            raise ValueError(
                f"{model.name} must have one output of {self.vocab_size} logits, got "
                f"{[x.shape for x in model.outputs]}. Build it with_mlm=True."
            )
        whole, memories = _rebuilt(model.inputs, logits[0])
        self.has_memory = bool(memories)
        inputs = whole.inputs
        if self.has_memory:
            names = [x.name for x in inputs]
            if names != ["token_ids", "decoder_token_ids"]:
                raise ValueError(f"{model.name} must be of application 'seq2seq', got {names}.")
            self._encoder = keras.Model(inputs[0], memories[0])
            inputs = [memories[0], inputs[1]]
        self._blocks: list[keras.layers.Layer] = []
        self._steps: list[_Step] = []
        self._call: _Call  # during a step
        self.max_length: int | None = None
        self.has_prefix = False
        self._decoder, _ = _rebuilt(inputs, whole.output, self._as_step)
        if not self._blocks:
            raise ValueError(f"{model.name} has no TransformerBlock to decode with.")
        [last] = [step for step in self._steps if step.number == len(self._blocks) - 1]
        last.is_last = True

    def _as_step(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """What a layer gives for the next tokens, None where it is called as it is."""
        if isinstance(layer, PrefixMask):
            self.has_prefix = True
        number = None
        if isinstance(layer, layers.PositionEmbedding):
            self.max_length = layer.max_length
        elif hasattr(layer, "step"):
            self._check(layer, kwargs)
            number = len(self._blocks)
            self._blocks.append(layer)
        elif not isinstance(layer, layers.T5Bias):
            return None
        self._steps.append(_Step(layer, self, number, name=f"step_{len(self._steps)}"))
        return self._steps[-1](*args, **kwargs)

    def _check(self, block: Any, kwargs: dict[str, Any]) -> None:
        crosses = getattr(block, "cross_attention", None) is not None
        if not block.attention.causal and kwargs.get("attention_mask") is None:
            raise ValueError(
                f"{self.model.name} must not see later tokens, but its {block.name} does. "
                "Build it with application='lm' or 'unilm'."
            )
        if "memory" in kwargs and not crosses:
            raise ValueError(f"{block.name} has a memory that is not of an encoder.")
        keeps = isinstance(
            block.attention, (layers.MultiHeadAttention, layers.GatedAttentionUnit)
        )
        if not keeps or getattr(block.attention, "window", None) is not None:
            raise ValueError(
                f"The attention of {block.name}, a {type(block.attention).__name__}, keeps no "
                "keys and values of all tokens. Decode it by its own `step`."
            )

    def initial_states(self, batch_size: int, size: int) -> list[Any]:
        """Empty caches of the blocks, for texts of at most `size` tokens, padding included."""
        return [block.attention.initial_state(batch_size, size) for block in self._blocks]

    def encode(self, token_ids: Any) -> list[Any]:
        """Keys and values of the encoder's output for token ids (batch, sources), by block."""
        memory = self._encoder(token_ids, training=False)
        return [block.cross_attention.remember(memory) for block in self._blocks]

    def step(
        self,
        token_ids: Any,
        valid: Any,
        states: list[Any],
        segment_ids: Any = None,
        memories: list[Any] | None = None,
        memory_mask: Any = None,
    ) -> tuple[Any, list[Any]]:
        """Logits after the last of the next tokens.

        Args:
            token_ids: integers (batch, tokens).
            valid: boolean (batch, size); False at the padding before the texts.
            states: of `initial_states` or of the step before.
            segment_ids: integers (batch, tokens). Default: zeros.
            memories: of `encode`, where the model has an encoder.
            memory_mask: boolean (batch, sources), False at the padding of the sources.

        Returns: logits (batch, vocab_size) in float32 at least, and the new states.
        """
        token_ids, valid = ops.convert_to_tensor(token_ids), ops.convert_to_tensor(valid)
        places = states[0]["length"] + ops.arange(ops.shape(token_ids)[1])
        known = {
            "token_ids": token_ids,
            "decoder_token_ids": token_ids,
            "segment_ids": ops.zeros_like(token_ids)
            if segment_ids is None
            else ops.convert_to_tensor(segment_ids),
        }
        names = [x.name for x in self._decoder.inputs]
        if self.has_memory:  # which the blocks have as keys and values
            batch, width = ops.shape(token_ids)[0], self._decoder.inputs[0].shape[-1]
            known[names[0]] = ops.zeros((batch, 1, width), self._decoder.inputs[0].dtype)
        new_states: list[Any] = [None] * len(states)
        memories = [] if memories is None else memories
        self._call = _Call(valid, places, states, new_states, memories, memory_mask)
        try:
            logits = self._decoder([known[name] for name in names], training=False)[:, -1]
        finally:
            del self._call  # it holds tensors, which may be of a program being compiled
        wide = at_least_float32(logits.dtype)
        return ops.cast(logits, wide), new_states

    def run(self, step: "_Step", inputs: Any, **kwargs: Any) -> Any:
        """What the layer of a step gives for the inputs at the next places."""
        layer, number, call = step.layer, step.number, self._call
        if isinstance(layer, layers.T5Bias):
            biases = layer.biases(call.places, ops.arange(ops.shape(call.valid)[1]))
            return ops.cast(biases, layer.compute_dtype)
        if number is None:  # no block: a `PositionEmbedding`
            padding = ops.sum(ops.cast(ops.logical_not(call.valid), "int32"), 1, keepdims=True)
            return layer(inputs, ops.maximum(call.places - padding, 0))
        pattern = {"attention_mask": self._seen(kwargs.pop("attention_mask", None))}
        if kwargs.get("attention_bias") is not None:
            pattern["attention_bias"] = kwargs["attention_bias"]
        if self.has_memory:
            pattern |= {
                "memory": call.memories[number],
                "memory_mask": call.memory_mask,
            }
        outputs, state = layer.step(inputs, call.states[number], **pattern)
        call.new_states[number] = state
        # What comes after the last block is for the last token alone.
        return outputs[:, -1:] if step.is_last else outputs

    def _seen(self, pattern: Any) -> Any:
        """The tokens before, and those of the pattern among the next: (batch, tokens, size)."""
        seen = self._call.valid[:, None]
        if pattern is None:
            return seen
        number, size = ops.shape(pattern)[1], ops.shape(seen)[2]
        everywhere = ops.broadcast_to(seen, (ops.shape(seen)[0], number, size))
        start = (0, 0, self._call.places[0])
        next_valid = ops.slice(everywhere, start, ops.shape(pattern))
        return ops.slice_update(everywhere, start, ops.logical_and(pattern, next_valid))


@dataclasses.dataclass
class _Call:
    """What the layers of one step share."""

    valid: Any
    places: Any  # of the next tokens in the caches
    states: list[Any]
    new_states: list[Any]
    memories: list[Any]
    memory_mask: Any


class _Step(keras.layers.Layer):
    """A layer of the graph, run by the cached model."""

    def __init__(self, layer: Any, cached: CachedModel, number: int | None, name: str) -> None:
        super().__init__(name=name, dtype=layer.dtype_policy)
        self.supports_masking = True
        self.layer = layer
        self.number = number
        self.is_last = False
        self._run = cached.run

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        return self._run(self, inputs, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None  # `valid` knows

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> keras.KerasTensor:
        return self.layer.compute_output_spec(inputs, **kwargs)


def _rebuilt(inputs: list[Any], output: Any, call: Any = None) -> tuple[keras.Model, list[Any]]:
    """The graph on the same layers, but for `call(layer, *args)` where that gives outputs.

    Returns: the model, and what the cross attentions attend to in it.
    """
    memories = []

    def call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(layer, "cross_attention", None) is not None:
            memories.append(kwargs["memory"])
        made = None if call is None else call(layer, *args, **kwargs)
        return layer(*args, **kwargs) if made is None else made

    rebuilt = keras.models.clone_model(
        keras.Model(inputs, output),
        clone_function=lambda layer: layer,
        call_function=call_layer,
    )
    return rebuilt, memories
