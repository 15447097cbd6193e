"""Hybrid window-full attention (HWFA): longer texts than a decoder was trained on.

All layers but the last see a causal window of w tokens, with rotary positions: they know no
position beyond it, in training or after. The last sees everything, without positions, its
scores multiplied by log_N(n). For L layers and training length N, w is the largest with a
receptive field before the last layer of

    (w - 1)(L - 1) + 1 <= α N,    α = 3/4

so that all that the windows can do together happens within the training length.

Costs n w instead of n²/2 scores in all layers but one, and caches of w - 1 tokens in decoding.
The price is a little accuracy within the training length (48.7 instead of 49.4 % of tokens in
the article's experiment; 48.2 instead of 23.2 % at 8 times the length).

Source: kexue.fm/archives/9603.
"""

from typing import Any

from keras_ext.layers.attention.positions import RotaryPosition


def hwfa_layers(
    num_layers: int, train_length: int, alpha: float = 0.75
) -> list[dict[str, Any]]:
    """Arguments of `MultiHeadAttention` for each layer of a decoder.

    Args:
        num_layers: L, all layers of the decoder.
        train_length: N, of the texts that it is trained on, in tokens.
        alpha: α, share of N that the windows together may reach. Default: 0.75.

    Raises:
        ValueError: `num_layers` is below 1, `train_length` below 2, or `alpha` not in (0, 1].

    Example:
        >>> kinds = hwfa_layers(num_layers=24, train_length=512)
        >>> layers_of_24 = [MultiHeadAttention(8, 64, **kind) for kind in kinds]
        >>> kinds[0]["window"], kinds[-1]["log_length"]
        (17, 512)

    Reference: kexue.fm/archives/9603.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
    if train_length < 2:
        raise ValueError(f"train_length must be at least 2, got {train_length}.")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}.")
    last = {"causal": True, "log_length": train_length}
    if num_layers == 1:
        return [last]
    window = max(1, int((alpha * train_length - 1) // (num_layers - 1)) + 1)
    windows = [
        {"causal": True, "window": window, "position": RotaryPosition()}
        for _ in range(num_layers - 1)
    ]
    return [*windows, last]
