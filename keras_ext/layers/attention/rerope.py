"""Rectified rotary positions (ReRoPE): longer texts than a model was trained on, untrained.

A model trained with rotary positions knows the distances 0 ... N - 1. At inference ReRoPE shows
it no others: distances d = i - j up to a window w are as before, longer ones all count as w,
or in the leaky form grow k times as slowly:

    d -> d if d < w else w                      ReRoPE
    d -> d if d < w else w + (d - w) / k        leaky ReRoPE

Each needs the scores of two rotations, of which a query and key take one by their distance.
w of N/4 to N/2 serves best, w = N fails. k = 1 is RoPE, k -> ∞ is ReRoPE, as is RoPE for all
texts up to w tokens.

Exact. Twice the products of queries and keys, and keys are cached unturned, so each step of a
decoder turns them anew. For causal attention: it has no distance for later tokens.

Source: kexue.fm/archives/9706 (ReRoPE), 9708 (leaky); github.com/bojone/rerope.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.positions import RotaryPosition


@keras.saving.register_keras_serializable(package="keras_ext")
class ReRoPE(RotaryPosition):
    """Rotary positions in training, rectified ones at inference; causal.

        d -> d if d < window else window + (d - window) / leak

    Args:
        window: w, longest distance that is kept; N/4 to N/2 for training length N.
        leak: k > 1, or None for ∞. Default: None.
        base, interleaved: as for `RotaryPosition`; those the model was trained with.

    Raises:
        ValueError: `window` is below 1, or `leak` below 1.

    Example:
        >>> attention = MultiHeadAttention(4, 8, causal=True, position=ReRoPE(window=256))

    Reference: kexue.fm/archives/9706, 9708.
    """

    only_encodes = False
    needs_causal = True

    def __init__(
        self,
        window: int,
        leak: float | None = None,
        base: float = 10_000.0,
        interleaved: bool = True,
    ) -> None:
        super().__init__(base, interleaved)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        if leak is not None and leak < 1:
            raise ValueError(f"leak must be at least 1, or None for infinity, got {leak}.")
        self.window = window
        self.leak = leak

    def in_training(self) -> RotaryPosition:
        return RotaryPosition(self.base, self.interleaved)

    def encode(self, x: Any, positions: Any) -> Any:
        return x  # turned in two ways by `scores`

    def scores(self, query: Any, key: Any, query_positions: Any, key_positions: Any) -> Any:
        near = super().scores(
            self.turn(query, query_positions),
            self.turn(key, key_positions),
            query_positions,
            key_positions,
        )
        slope = 0.0 if self.leak is None else 1 / self.leak
        at, of = (slope * ops.cast(p, "float32") for p in (query_positions, key_positions))
        far = super().scores(
            self.turn(query, at + self.window * (1 - slope)),
            self.turn(key, of) if slope else key,
            at,
            of,
        )
        # ([batch,] 1, targets, sources)
        distance = query_positions[..., None, :, None] - key_positions[..., None, None, :]
        return ops.where(distance < self.window, near, far)

    def get_config(self) -> dict[str, Any]:
        return {"window": self.window, "leak": self.leak, **super().get_config()}
