"""The blocks of a Transformer, and the layers below them, by the names models give them."""

import re
from typing import Any, Literal

import keras

from keras_ext.layers.every import every_layer

Side = Literal["encoder", "decoder"]

BLOCK = re.compile(r"(encoder|decoder)_(\d+)")
# What makes the input of the first blocks; `encoder_position` is a `T5Bias` of all of them.
BELOW = (
    *("token_embedding", "segment_embedding", "position_embedding", "embedding_norm"),
    *("token_norm", "position_norm", "embedding_projection"),
    *("encoder_position", "decoder_position"),
)


def blocks(model: Any, side: Side | None = None) -> list[keras.layers.Layer]:
    """The blocks of a model of `build_transformer_model`, or of a model around such a one.

    Args:
        model: a `keras.Model`; those nested in it count, too.
        side: "encoder" or "decoder". Default: both, in this order.

    Returns: the layers encoder_0, encoder_1, ..., in the order of their numbers.

    Raises:
        ValueError: `side` is neither, the model has no such blocks, or several of one name.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> [block.name for block in blocks(bert)]
        ['encoder_0']
    """
    if side not in (None, "encoder", "decoder"):
        raise ValueError(f"side must be 'encoder' or 'decoder', got {side!r}.")
    found: dict[tuple[int, int], keras.layers.Layer] = {}
    for layer in every_layer(model):
        match = BLOCK.fullmatch(layer.name)
        if match is None or side not in (None, match[1]):
            continue
        key = int(match[1] == "decoder"), int(match[2])
        if found.setdefault(key, layer) is not layer:
            raise ValueError(
                f"{model.name} has two layers {layer.name}. Give one of the models in it."
            )
    if not found:
        raise ValueError(
            f"{model.name} has no layers {side or 'encoder'}_0, {side or 'encoder'}_1, ... "
            "Build it with build_transformer_model."
        )
    return [found[key] for key in sorted(found)]
