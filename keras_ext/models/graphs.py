"""Whether a model is what its family builds from its sizes: layer by layer, edge by edge.

The configuration that is written next to the weights says nothing else. So what somebody set by
hand, or put between two layers, is found before another model is saved than the one at hand.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_ext.models.checkpoints import skeleton
from keras_ext.models.family import Family

# What changes no output of a trained model, follows from where it was built, or is merged.
PASSING = {
    *("architecture", "batch_shape", "dropout", "dtype", "name", "rate", "recompute", "seed"),
    *("shared_object_id", "trainable", "lora_rank", "lora_alpha"),
}
PASSING_KINDS = ("_initializer", "_regularizer", "_constraint")


class Node(NamedTuple):
    """A layer in a graph."""

    kind: str
    config: dict[str, Any]
    calls: list[list[str]]  # the layers whose outputs each call takes


def check_graph(model: keras.Model, sizes: Family) -> None:
    """Refuse a model that the family would not build from these sizes.

    Raises:
        ValueError: a layer of the trunk is absent, another one, configured otherwise, or called
            on something else; heads may be absent.
    """
    kind = type(sizes).__name__
    whole = skeleton(lambda: sizes.build(**dict.fromkeys(sizes.heads, True)))
    hidden = whole.outputs[0]
    trunk = _nodes(whole.inputs, [hidden])
    found = _nodes(model.inputs, model.outputs)
    for name, node in _nodes(whole.inputs, whole.outputs).items():
        if name not in found:
            if name not in trunk:
                continue
            difference = "it is absent"
        else:
            calls = trunk[name].calls if name in trunk else []  # heads may stand anywhere
            difference = next(_differences(node, found[name], calls), "")
        if difference:
            raise ValueError(
                f"{model.name} is not the {kind} of its sizes, so no configuration says what "
                f"it is. {name}: {difference}. model.save(path) keeps any model."
            )


def _nodes(inputs: list[Any], outputs: list[Any]) -> dict[str, Node]:
    """The graph by the names of its layers; operations, which have no names of their own, are
    known by their kind."""
    graph = keras.Model(inputs, outputs)
    layers = graph.get_config()["layers"]
    named = {layer.name for layer in graph.layers}
    operations = {x["name"]: x["class_name"] for x in layers if x["name"] not in named}
    return {
        layer["name"]: Node(
            layer["registered_name"] or layer["class_name"],
            layer["config"],
            [
                [operations.get(name, name) for name in _sources(node)]
                for node in layer["inbound_nodes"]
            ],
        )
        for layer in layers
        if layer["name"] not in operations
    }


def _sources(value: Any) -> Iterator[str]:
    """The layers of all tensors in the arguments of a call, as Keras writes them down."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            yield value["config"]["keras_history"][0]
        else:
            for key in sorted(value):
                yield from _sources(value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _sources(part)


def _differences(expected: Node, found: Node, calls: list[list[str]]) -> Iterator[str]:
    if found.kind != expected.kind:
        yield f"it is a {found.kind}, not a {expected.kind}"
    yield from _changes(expected.config, found.config)
    for call in calls:
        if found.calls.count(call) != calls.count(call):
            yield (
                f"it is called on {found.calls}, not {calls.count(call)} times on {call}"
                if calls.count(call) > 1
                else f"it is called on {found.calls}, not on {call}"
            )


def _changes(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """What is configured otherwise, as sentences."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in PASSING and not key.endswith(PASSING_KINDS):
                within = key if key != "config" else ""
                path = ".".join(part for part in (name, within) if part)
                yield from _changes(expected.get(key), found.get(key), path)
    elif expected != found and [*_plain(expected)] != [*_plain(found)]:
        yield f"{name or 'it'} is {found!r}, not {expected!r}"


def _plain(value: Any) -> Iterator[Any]:
    """Lists and tuples are the same after a file."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _plain(part)
    else:
        yield value
