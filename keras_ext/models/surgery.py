"""Change a built Transformer: other layers in the place of some, with all weights that fit.

The models made here are copies: nothing done to one of them changes another.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_ext.layers.transformer import serialize_unbuilt
from keras_ext.models.rebuild import blocks_of, copy_layer, rebuild


def replace_attention(
    model: keras.Model,
    attention: Callable[[keras.layers.Layer], keras.layers.Layer],
    blocks: Iterable[int] | None = None,
) -> keras.Model:
    """The model with another attention in its blocks.

    Weights of the new attention get the values of those of the old one that have the same name
    and shape, as the four projections of all attention layers of `keras_ext` have; the others
    are fresh.

    Args:
        model: of `build_transformer_model`, or a functional model on its outputs, such as
            `keras.Model(bert.inputs, Dense(2)(bert.output[:, 0]))`.
        attention: the layer of a block -> the one in its place, a new one for each block.
        blocks: numbers of the blocks to change. Default: all.

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: the model has no blocks `encoder_0` ..., or not those asked for.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> with_dropout = replace_attention(
        ...     bert, lambda old: MultiHeadAttention(old.num_heads, old.key_dim, dropout=0.1)
        ... )
    """
    found = [block.name for block in blocks_of(model)]
    numbers = range(len(found)) if blocks is None else list(blocks)
    wanted = {f"encoder_{i}" for i in numbers}
    if not wanted <= set(found):
        raise ValueError(f"blocks must be among 0 to {len(found) - 1}, got {sorted(numbers)}.")
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    made: dict[str, keras.layers.Layer] = {}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name not in wanted:
            return None
        if layer.name not in made:
            new = serialize_unbuilt(attention(layer.attention))
            new["config"]["name"] = layer.attention.name  # which checkpoints know
            made[layer.name] = copy_layer(layer, attention=new)
            pairs.append((layer, made[layer.name]))
        return made[layer.name](*args, **kwargs)

    changed = rebuild(model, call)
    for old, new in pairs:
        values = {weight.path: weight for weight in old.weights}
        for weight in new.weights:
            known = values.get(weight.path)
            if known is not None and known.shape == weight.shape:
                weight.assign(known)
    return changed
