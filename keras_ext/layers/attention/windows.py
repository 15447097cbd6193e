"""Sliding windows: each token sees its neighbours only, in O(length · window).

The texts are cut into blocks. Each becomes a row of the batch, its keys with those around it
that the window reaches:

    block of queries        |    b    |
    its keys           |w - 1|    b    |w - 1|        the last part only if not causal

A mask over the whole text would forbid the same pairs and still compute all n² of them.
"""

from typing import Any

from keras import ops

SMALLEST_BLOCK = 32  # smaller products take as long


class WindowBlocks:
    """How texts of one length are cut.

    Args:
        length: of the texts, an integer or a tensor.
        window: w, number of tokens seen to one side, itself included.
        causal: no token sees later ones.
    """

    def __init__(self, length: Any, window: int, causal: bool) -> None:
        self.length = length
        self.window = window
        self.causal = causal
        self.size = max(window, SMALLEST_BLOCK)
        self.number = (length + self.size - 1) // self.size  # ONNX rounds -x // y to zero
        span = self.size + (window - 1) * (1 if causal else 2)
        self.query_positions = ops.arange(window - 1, window - 1 + self.size)
        self.key_positions = ops.arange(span)  # counted from the first key of the block

    def of_queries(self, x: Any) -> Any:
        """(batch, length, ...) -> (batch · number, size, ...)"""
        x = self._pad(x, 0, 0)
        return ops.reshape(x, (-1, self.size, *x.shape[2:]))

    def of_keys(self, x: Any) -> Any:
        """(batch, length, ...) -> (batch · number, span, ...); zeros stand beyond the ends."""
        reach, rest = self.window - 1, x.shape[2:]
        x = self._pad(x, self.size, self.size)
        x = ops.reshape(x, (-1, self.number + 2, self.size, *rest))
        parts = [x[:, :-2, self.size - reach :], x[:, 1:-1]]
        if not self.causal:
            parts.append(x[:, 2:, :reach])
        x = ops.concatenate(parts, axis=2)
        return ops.reshape(x, (-1, self.key_positions.shape[0], *rest))

    def _pad(self, x: Any, before: int, after: int) -> Any:
        after = after + self.number * self.size - self.length
        return ops.pad(x, [(0, 0), (before, after), *[(0, 0)] * (len(x.shape) - 2)])

    def mask(self, source_mask: Any) -> Any:
        """(batch, length) -> (batch · number, 1, size, span): in the text and in the window."""
        distance = self.query_positions[:, None] - self.key_positions
        seen = ops.logical_and(
            distance < self.window, distance >= (0 if self.causal else 1 - self.window)
        )
        inside = ops.expand_dims(self.of_keys(source_mask), (1, 2))
        return ops.logical_and(inside, seen)

    def joined(self, x: Any) -> Any:
        """The way back from `of_queries`."""
        x = ops.reshape(x, (-1, self.number * self.size, *x.shape[2:]))
        return x[:, : self.length]
