"""What generation needs of an attention: a state, and steps.

    state = attention.initial_state(batch_size, max_length)
    outputs, state = attention.step(inputs, state, valid)    the next tokens, one or several

The outputs are those of a call with the whole text. What a state holds is the attention's own
affair: keys and values of all tokens or of a window (`cache.py`), or sums that do not grow with
the text (`feature_sums.py`). `generation.CachedModel` takes any layer with the two methods.
"""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DecodingAttention(Protocol):
    """The interface; a layer need not inherit from it.

    A state is a structure of tensors that keep their shapes and dtypes from step to step. Their
    first axis is the batch, so that beam search can reorder texts; scalars are common to all.

    A layer may also have:
        causal: False where a call lets tokens see later ones; then it can only generate by an
            attention mask. Default: True.
        step_patterns: which of these `step` takes besides: "attention_mask", boolean (batch,
            tokens, tokens), what the next tokens see of each other, and "attention_bias",
            (batch, heads, tokens, max_length), added to the scores. Default: none.
        remember, recall: as of `ProjectedAttention`, for a cross attention.

    Example:
        >>> class RunningMean(keras.layers.Layer):
        ...     def call(self, x, memory):
        ...         return ops.cumsum(x, 1) / ops.cumsum(ops.ones_like(x), 1)
        ...
        ...     def initial_state(self, batch_size, max_length):
        ...         return ops.zeros((batch_size, 1, 32)), ops.zeros((batch_size, 1, 1))
        ...
        ...     def step(self, x, state, valid=None):
        ...         one = ops.ones_like(x[..., :1])
        ...         one = one if valid is None else ops.where(valid[..., None], one, 0)
        ...         sums = state[0] + ops.cumsum(one * x, 1)
        ...         numbers = state[1] + ops.cumsum(one, 1)
        ...         return sums / ops.maximum(numbers, 1), (sums[:, -1:], numbers[:, -1:])
        >>> isinstance(RunningMean(), DecodingAttention)
        True
    """

    def initial_state(self, batch_size: int, max_length: int) -> Any:
        """The state before the first token, for at most `max_length` tokens with padding."""

    def step(self, inputs: Any, state: Any, valid: Any = None) -> tuple[Any, Any]:
        """The next tokens, which see those before them and, in their order, each other.

        Args:
            inputs: (batch, tokens, width).
            state: of `initial_state`, or of the step before.
            valid: boolean (batch, tokens), False at the padding before the texts, which no
                token sees, now or later. Default: None, there is none.

        Returns: the outputs, like `inputs`, and the new state.
        """


def check_order(causal: bool, attention_mask: Any) -> None:
    """Refuse steps of an attention in which later tokens would change the outputs."""
    if not causal and attention_mask is None:
        raise ValueError("step needs causal=True: a later token would change the output.")
