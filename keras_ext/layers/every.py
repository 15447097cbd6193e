"""The layers of a network, also those inside of other layers and models."""

from typing import Any

import keras


def every_layer(network: Any) -> list[keras.Layer]:
    """All layers in it, however deep: of nested models, of wrappers, attributes of layers."""
    return list(network._flatten_layers(include_self=False))  # private: no public list is deep


def dtype_config(layer: keras.Layer) -> Any:
    """The dtype in the configuration of a layer that makes its sublayers by itself: with those
    that `model.quantize` gave to some, by their names, for `sublayer_dtype`."""
    policy = layer.dtype_policy
    quantized = {
        part.name: part.dtype_policy
        for part in every_layer(layer)
        if getattr(part, "quantization_mode", None) is not None
    }
    if quantized:
        default = getattr(policy, "default_policy", policy)
        policy = keras.dtype_policies.DTypePolicyMap(default.name, quantized)
    return keras.dtype_policies.serialize(policy)


def sublayer_dtype(layer: keras.Layer, name: str) -> Any:
    """The dtype for a sublayer, that of the layer unless `dtype_config` says otherwise."""
    policy = layer.dtype_policy
    return policy[name] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy


def find_layer(network: Any, name: str) -> keras.Layer:
    """The layer of this name or path.

    Raises:
        ValueError: the network has no such layer, or several.
    """
    layers = every_layer(network)
    found = [x for x in layers if x.name == name] or [x for x in layers if x.path == name]
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(repr(x.path) for x in found)
        raise ValueError(
            f"layer must be one, got {name!r}, the name of several: give a path, {paths}."
        )
    names = ", ".join(sorted({repr(x.name) for x in layers})[:20])
    raise ValueError(f"layer must be one of {network.name}, got {name!r}. It has {names}.")
