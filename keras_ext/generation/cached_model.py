"""Language models token by token: what their attentions need of the tokens before is kept.

    logits, states = step(tokens, states),    equal to those of the whole text

With keys and values kept, a step costs O(t (n + w)) for t new tokens after at most n, where the
whole text again would cost O((n + t) (n + t + w)), w being the width. Exact but for rounding.

The graph of the model is built again on its own layers, which keep their weights: blocks and
positions are called by what they do for the next tokens, all other layers treat tokens one by
one and are called as they are. So whatever `build_transformer_model` and surgery make can
generate, if no token sees later ones that are yet to come, and all attentions have the methods
of a `DecodingAttention`.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import layers
from keras_ext.layers.attention.decoding import DecodingAttention
from keras_ext.numerics import at_least_float32


class CachedModel:
    """The next logits of a language model, with a cache.

    Texts of a batch end together: shorter ones have padding before them, which `valid` marks
    and no token sees.

    Args:
        model: functional, of `build_transformer_model`: a language model or UniLM
            (`application`) or a sequence-to-sequence model, with its logits (`with_mlm`). It
            may have a further input, `condition`, such as `condition_norms` makes.

    Attributes:
        max_length: tokens that the model has positions for, None for any number.
        vocab_size: of its logits.
        padding_id: of the token that is padding, which the model never sees, or None.
        has_prefix: whether it is a UniLM.
        has_memory: whether it has an encoder.

    Raises:
        ValueError: the model has no logits, or further inputs, not only earlier tokens are
            seen, or an attention lacks what it takes to be decoded.

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
        self.vocab_size = embedding.input_dim
        self.padding_id = embedding.padding_id if embedding.mask_zero else None
        logits = [x for x in model.outputs if x.shape[-1] == self.vocab_size]
        if len(logits) != 1:
            raise ValueError(
                f"{model.name} must have one output of {self.vocab_size} logits, got "
                f"{[x.shape for x in model.outputs]}. Build it with_mlm=True."
            )
        whole, memories = _rebuilt(model.inputs, logits[0])
        self.has_memory = bool(memories)
        inputs = {x.name: x for x in whole.inputs}
        self._check_inputs([*inputs])
        self._condition = inputs.get("condition")
        starts = [*inputs.values()]
        if self.has_memory:
            self._encoder = _connected(
                [x for x in starts if x.name != "decoder_token_ids"], memories[0]
            )
            starts = [memories[0], *(x for x in starts if x.name != "token_ids")]
        self._blocks: list[keras.layers.Layer] = []
        self._steps: list[_Step] = []
        self._call: _Call  # during a step
        self.max_length: int | None = None
        self.has_prefix = False
        self._decoder, _ = _rebuilt(starts, whole.outputs[0], self._as_step)
        if not self._blocks:
            raise ValueError(f"{model.name} has no TransformerBlock to decode with.")
        [last] = [step for step in self._steps if step.number == len(self._blocks) - 1]
        last.is_last = True

    def _check_inputs(self, names: list[str]) -> None:
        if self.has_memory and not {"token_ids", "decoder_token_ids"} <= {*names}:
            raise ValueError(
                f"{self.model.name} must be of application 'seq2seq', got {names}."
            )
        known = "token_ids", "decoder_token_ids" if self.has_memory else "segment_ids"
        further = [name for name in names if name not in (*known, "condition")]
        if further:
            raise ValueError(
                f"{self.model.name} must have no inputs but {', '.join(known)} and condition, "
                f"got {', '.join(further)} too. What else the text depends on can be made a "
                "part of the condition, outside of the model."
            )

    def _as_step(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """What a layer gives for the next tokens, None where it is called as it is."""
        if isinstance(layer, layers.PrefixMask):
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
        """Refuse a block for what it lacks."""
        attention, cross = (
            getattr(block, name, None) for name in ("attention", "cross_attention")
        )
        if attention is None:
            raise ValueError(f"{block.name} must be the attention of a TransformerBlock.")
        the_attention = f"The attention of {block.name}, a {type(attention).__name__},"
        if not isinstance(attention, DecodingAttention):
            raise ValueError(
                f"{the_attention} has no `initial_state` and `step` to be decoded by. See "
                "`DecodingAttention` for what they do, or replace_attention."
            )
        patterns = getattr(attention, "step_patterns", ())
        for name in ("attention_mask", "attention_bias"):
            if kwargs.get(name) is not None and name not in patterns:
                raise ValueError(
                    f"{the_attention} takes no {name} in its steps, with which the block is "
                    "called. Build the model without (a UniLM with application='lm'), or give "
                    "it an attention that takes one: MultiHeadAttention without a window."
                )
        if not getattr(attention, "causal", True) and kwargs.get("attention_mask") is None:
            raise ValueError(
                f"{self.model.name} must not see later tokens, but its {block.name} does. "
                "Build it with application='lm' or 'unilm'."
            )
        if "memory" in kwargs and cross is None:
            raise ValueError(f"{block.name} has a memory that is not of an encoder.")
        if cross is not None and not (hasattr(cross, "remember") and hasattr(cross, "recall")):
            raise ValueError(
                f"The cross attention of {block.name}, a {type(cross).__name__}, has no "
                "`remember` and `recall`. See `ProjectedAttention` for what they do."
            )

    def initial_states(self, batch_size: int, size: int) -> dict[str, Any]:
        """States before the first token, for texts of at most `size` tokens with padding.

        Returns: `length`, the number of tokens that came, and `blocks`, a state of each.
        """
        return {
            "length": ops.zeros((), "int32"),
            "blocks": [
                block.attention.initial_state(batch_size, size) for block in self._blocks
            ],
        }

    def encode(self, token_ids: Any, condition: Any = None) -> list[Any]:
        """Keys and values of the encoder's output for token ids (batch, sources), by block.

        Args:
            condition: as of `step`.
        """
        token_ids = ops.convert_to_tensor(token_ids)
        known = {
            "token_ids": token_ids,
            "condition": self.as_condition(condition, token_ids.shape[0]),
        }
        memory = self._encoder([known[x.name] for x in self._encoder.inputs], training=False)[0]
        return [block.cross_attention.remember(memory) for block in self._blocks]

    def as_condition(self, condition: Any, batch_size: int) -> Any:
        """The condition as a tensor, None where the model has none.

        Raises:
            ValueError: it is not of the shape that the model has an input for.
        """
        shape = None if condition is None else tuple(np.shape(condition))
        if self._condition is None:
            if condition is not None:
                raise ValueError(
                    f"condition must be None, as {self.model.name} has no input of that name, "
                    f"got an array {shape}. condition_norms makes one."
                )
            return None
        expected = (batch_size, *self._condition.shape[1:])
        if shape != expected:
            raise ValueError(
                f"condition must be an array {expected}, a row for each text, as "
                f"{self.model.name} has an input of that name, got {shape}."
            )
        return ops.convert_to_tensor(condition, self._condition.dtype)

    def step(
        self,
        token_ids: Any,
        valid: Any,
        states: dict[str, Any],
        segment_ids: Any = None,
        memories: list[Any] | None = None,
        memory_mask: Any = None,
        condition: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Logits after the last of the next tokens.

        Args:
            token_ids: integers (batch, tokens).
            valid: boolean (batch, size); False at the padding before the texts.
            states: of `initial_states` or of the step before.
            segment_ids: integers (batch, tokens). Default: zeros.
            memories: of `encode`, where the model has an encoder.
            memory_mask: boolean (batch, sources), False at the padding of the sources.
            condition: (batch, features), where the model has an input `condition`.

        Returns: logits (batch, vocab_size) in float32 at least, and the new states.
        """
        token_ids, valid = ops.convert_to_tensor(token_ids), ops.convert_to_tensor(valid)
        (batch, number), length = ops.shape(token_ids), states["length"]
        known = {
            "token_ids": token_ids,
            "decoder_token_ids": token_ids,
            "segment_ids": ops.zeros_like(token_ids)
            if segment_ids is None
            else ops.convert_to_tensor(segment_ids),
            "condition": self.as_condition(condition, token_ids.shape[0]),
        }
        names = [x.name for x in self._decoder.inputs]
        if self.has_memory:  # which the blocks have as keys and values
            memory = self._decoder.inputs[0]
            known[memory.name] = ops.zeros((batch, 1, memory.shape[-1]), memory.dtype)
        self._call = _Call(
            places=length + ops.arange(number),
            valid=valid,
            next_valid=ops.slice(valid, (0, length), (batch, number)),
            states=states["blocks"],
            new_states=[None] * len(self._blocks),
            memories=memories or [],
            memory_mask=memory_mask,
        )
        try:
            logits = self._decoder([known[name] for name in names], training=False)[0][:, -1]
            blocks = self._call.new_states
        finally:
            del self._call  # it holds tensors, which may be of a program being compiled
        logits = ops.cast(logits, at_least_float32(logits.dtype))
        return logits, {"length": length + number, "blocks": blocks}

    def run(self, step: "_Step", inputs: Any, **kwargs: Any) -> Any:
        """What the layer of a step gives for the inputs at the next places."""
        layer, number, call = step.layer, step.number, self._call
        if isinstance(layer, layers.T5Bias):
            biases = layer.biases(call.places, ops.arange(ops.shape(call.valid)[1]))
            return ops.cast(biases, layer.compute_dtype)
        if number is None:  # no block: a `PositionEmbedding`
            padding = ops.sum(ops.cast(ops.logical_not(call.valid), "int32"), 1, keepdims=True)
            return layer(inputs, ops.maximum(call.places - padding, 0))
        names = ("attention_mask", "attention_bias", "condition")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if self.has_memory:
            given |= {"memory": call.memories[number], "memory_mask": call.memory_mask}
        outputs, state = layer.step(inputs, call.states[number], valid=call.next_valid, **given)
        call.new_states[number] = state
        # What comes after the last block is for the last token alone.
        return outputs[:, -1:] if step.is_last else outputs


@dataclasses.dataclass
class _Call:
    """What the layers of one step share."""

    places: Any  # of the next tokens among all, (tokens,)
    valid: Any  # of all tokens, (batch, size)
    next_valid: Any  # of the next
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


def _connected(inputs: list[Any], output: Any) -> keras.Model:
    """Its first output is the one given: older Keras wants every input to lead to one."""
    return keras.Model(inputs, [output, *map(keras.layers.Identity(), inputs)])


def _rebuilt(inputs: list[Any], output: Any, call: Any = None) -> tuple[keras.Model, list[Any]]:
    """The graph on the same layers, but for `call(layer, *args)` where that gives outputs.

    Returns: the model, of which the first output counts, and what the cross attentions attend
        to in it.
    """
    memories = []

    def call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(layer, "cross_attention", None) is not None:
            memories.append(kwargs["memory"])
        made = None if call is None else call(layer, *args, **kwargs)
        return layer(*args, **kwargs) if made is None else made

    rebuilt = keras.models.clone_model(
        _connected(inputs, output),
        clone_function=lambda layer: layer,
        call_function=call_layer,
    )
    return rebuilt, memories
