"""What a Transformer costs by its sizes, and from which length on attention dominates.

Multiplications of one layer, for n tokens, width D = h d and feed-forward width r D:

    projections        4 n D²          2 n D² + 2 n D D_kv with grouped heads
    softmax            2 n² D          half of it if causal and no masked block is computed
    linear             2 n m D         for m features of each head; causal in chunks of C tokens
                                       also n C (m h + D)
    favor              4 n m D         the features themselves cost as much again
    feed-forward       2 r n D²        3 r n D² if gated

and n D V of a language model's head. A multiplication with its addition is 2 FLOPs. The
backward pass costs twice the forward pass.

So softmax attention costs more than the feed-forward layers from n = (r - 2) D on, and its
square more than all else from n = (r + 2) D: 1,536 and 4,608 tokens for a BERT-base. Time is
another matter: softmax and norms are bound by memory, short products by their start.

Source: kexue.fm/archives/8610.
"""

from collections.abc import Sequence
from typing import Any

ATTENTIONS = ("softmax", "linear", "favor")


def transformer_flops(
    length: int,
    hidden_size: int,
    num_heads: int,
    num_layers: int,
    intermediate_size: int | None = None,
    num_kv_heads: int | None = None,
    vocab_size: int | None = None,
    attention: str = "softmax",
    num_features: int | None = None,
    causal: bool = False,
    chunk_size: int = 128,
    gated: bool = False,
    training: bool = False,
) -> dict[str, int]:
    """FLOPs of one text, by part; of matrix products alone.

    Args:
        length: n, tokens of the text.
        hidden_size: D.
        num_heads: h.
        num_layers: number of layers.
        intermediate_size: r D. Default: 4 D.
        num_kv_heads: heads of keys and values. Default: `num_heads`.
        vocab_size: V of a language model's head. Default: None, no head.
        attention: "softmax", "linear" or "favor". Default: "softmax".
        num_features: m of the last two. Default: d.
        causal: half of the square; of linear attention, in chunks. Default: False.
        chunk_size: C. Default: 128.
        gated: three matrices in a feed-forward layer instead of two. Default: False.
        training: forward and backward pass. Default: False.

    Returns: "projections", "features", "attention", "feed_forward", "head" and "total".

    Raises:
        ValueError: `attention` is unknown, or `num_heads` does not divide `hidden_size`.

    Example:
        >>> flops = transformer_flops(4608, 768, num_heads=12, num_layers=12)
        >>> flops["attention"] == flops["projections"] + flops["feed_forward"]
        True

    Reference: kexue.fm/archives/8610.
    """
    if attention not in ATTENTIONS:
        known = ", ".join(ATTENTIONS)
        raise ValueError(f"attention must be one of {known}, got {attention!r}.")
    if hidden_size % num_heads:
        raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}.")
    size = hidden_size // num_heads
    features = num_features or size
    kv_size = size * (num_kv_heads or num_heads)
    tokens = length * num_layers
    parts = {
        "projections": 2 * tokens * hidden_size * (hidden_size + kv_size),
        "features": 2 * tokens * features * hidden_size if attention == "favor" else 0,
        "feed_forward": tokens * hidden_size * (intermediate_size or 4 * hidden_size),
        "head": length * hidden_size * (vocab_size or 0),
    }
    parts["feed_forward"] *= 3 if gated else 2
    if attention == "softmax":
        parts["attention"] = 2 * tokens * length * hidden_size // (2 if causal else 1)
    else:
        parts["attention"] = 2 * tokens * features * hidden_size
        if causal:
            parts["attention"] += tokens * chunk_size * (features * num_heads + hidden_size)
    flops = {name: 2 * (3 if training else 1) * number for name, number in parts.items()}
    return {**flops, "total": sum(flops.values())}


def crossover(
    hidden_size: int,
    num_heads: int,
    intermediate_size: int | None = None,
    num_features: int | None = None,
) -> dict[str, int]:
    """Lengths from which on one part costs more than another.

    Args:
        hidden_size: D.
        num_heads: h.
        intermediate_size: r D. Default: 4 D.
        num_features: m of linear attention and FAVOR+. Default: d.

    Returns:
        "attention_over_feed_forward": softmax attention, projections included.
        "square_over_rest": its square over all else of the layer.
        "linear_wins", "favor_wins": they need fewer FLOPs than softmax attention.

    Example:
        >>> crossover(768, num_heads=12)["square_over_rest"]
        4608
    """
    intermediate = intermediate_size or 4 * hidden_size
    features = num_features or hidden_size // num_heads
    return {
        "attention_over_feed_forward": max(0, intermediate - 2 * hidden_size),
        "square_over_rest": intermediate + 2 * hidden_size,
        "linear_wins": features,
        "favor_wins": 2 * features,
    }


def plot_flops(lengths: Sequence[int], **sizes: Any) -> Any:
    """A figure of the shares of all parts in the FLOPs of softmax attention, by length.

    Args:
        lengths: n, in rising order.
        **sizes: what `transformer_flops` takes, but `length`.

    Returns: a `matplotlib.figure.Figure`, to be saved by `savefig`.

    Example:
        >>> figure = plot_flops([512, 2048], hidden_size=768, num_heads=12, num_layers=12)
        >>> figure.savefig("flops.png")
    """
    from matplotlib.figure import Figure

    table = [transformer_flops(length, **sizes) for length in lengths]
    names = [name for name in table[0] if name != "total" and table[0][name]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shares = [[row[name] / row["total"] for row in table] for name in names]
    axes.stackplot(list(lengths), shares, labels=[name.replace("_", "-") for name in names])
    axes.set(xscale="log", xlabel="length", ylabel="share of the FLOPs", ylim=(0, 1))
    axes.margins(x=0)
    axes.legend(loc="upper left")
    return figure
