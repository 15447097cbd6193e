"""The family and sizes that a built model carries.

They are in the configuration of its token embedding, which stays where the graph is taken
apart, copied or saved. Surgery states them anew, or withdraws them with the reason.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from keras_ext import layers
from keras_ext.layers.every import every_layer
from keras_ext.models.family import Family, Sizes, known_family


def family_of(model: keras.Model) -> Family:
    """The family and sizes of a built model.

    Args:
        model: of `build_transformer_model`, or a functional model around it, also one that was
            copied, changed by surgery or loaded.

    Raises:
        ValueError: it has none, several, or such as no family has any more, with the reason.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> head = keras.layers.Dense(2)(bert.output[:, 0])
        >>> family_of(keras.Model(bert.inputs, head)).hidden_size
        768
    """
    record = _carrier(model).architecture
    if "left" in record:
        raise ValueError(
            f"{model.name} is no {known_family(record['family']).__name__} of any sizes: "
            f"{record['left']}."
        )
    return read_record(record)


def read_record(record: Mapping[str, Any]) -> Family:
    """The sizes that a record holds."""
    return known_family(record["family"])(**record["sizes"])


def restate(
    model: keras.Model,
    original: keras.Model,
    change: Callable[[Any], Family | str],
    left: str | None = None,
) -> keras.Model:
    """The model, that surgery made of the original, with sizes that are true again.

    Args:
        change: the sizes of the original -> those of the model, or why no family has such.
            A ValueError is such a reason, too.
        left: why the original had none, where that is over.
    """
    carriers = _carriers(model)
    if len(carriers) != 1 or carriers[0].architecture.get("left") != left:
        return model  # it was none before
    sizes = read_record(_carrier(original).architecture)
    try:
        changed: Family | str = change(sizes)
    except ValueError as error:
        changed = str(error)
    record = (
        {**sizes.record(), "left": changed} if isinstance(changed, str) else changed.record()
    )
    carriers[0].architecture = record
    return model


def with_blocks(sizes: Sizes, side: str, numbers: Iterable[int]) -> Sizes:
    """The sizes with some groups of blocks of a side only.

    Raises:
        ValueError: no sizes say which blocks are the same one then.
    """
    new = {old: number for number, old in enumerate(numbers)}
    return _regrouped(sizes, side, [new[g] for g in sizes.group_of(side) if g in new], new)


def with_groups(sizes: Sizes, side: str, number: int) -> Sizes:
    """The sizes with so many groups of blocks of a side; each has its first block.

    Raises:
        ValueError: no sizes say which blocks are the same one then.
    """
    groups = sizes.groups(side)
    new: dict[int, int] = {}
    for old in range(groups):
        if old * number // groups not in new.values():
            new[old] = old * number // groups
    grouped = [group * number // groups for group in sizes.group_of(side)]
    return _regrouped(sizes, side, grouped, new)


def _regrouped(sizes: Sizes, side: str, group_of: list[int], new: dict[int, int]) -> Sizes:
    """The sizes with the groups `group_of`, where group new[i] was i."""
    field = sizes.group_field(side)
    length = {"encoder": "num_hidden_layers", "decoder": "num_decoder_layers"}[side]
    groups: int | None = len(set(group_of))
    if getattr(sizes, field) is None and groups == len(group_of):
        groups = None
    others = sizes.attention or {}
    attention = {k: v for k, v in others.items() if not k.startswith(f"{side}_")} | {
        f"{side}_{number}": others[f"{side}_{old}"]
        for old, number in new.items()
        if f"{side}_{old}" in others
    }
    changes = {length: len(group_of), field: groups, **sizes.of_blocks(side, new)}
    changed = dataclasses.replace(sizes, attention=attention or None, **changes)
    if changed.group_of(side) != group_of:
        raise ValueError(
            f"its {side} has blocks of the groups {group_of}, where sizes mean "
            f"{changed.group_of(side)}"
        )
    return changed


def _carriers(model: keras.Model) -> list[layers.TokenEmbedding]:
    return [
        layer
        for layer in every_layer(model)
        if isinstance(layer, layers.TokenEmbedding) and layer.architecture is not None
    ]


def _carrier(model: keras.Model) -> layers.TokenEmbedding:
    carriers = _carriers(model)
    if not carriers:
        raise ValueError(
            f"{model.name} must be built by build_transformer_model, or hold the layers of "
            "such a model; it has no token embedding of one."
        )
    if len(carriers) > 1:
        raise ValueError(
            f"{model.name} holds several Transformers, with the token embeddings "
            f"{', '.join(layer.name for layer in carriers)}. Give one of them."
        )
    return carriers[0]
