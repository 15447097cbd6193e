"""LoRA adapters as Keras's layers have them, after `layer.enable_lora(rank, lora_alpha)`.

    W = W0 + s A B,    s = lora_alpha / rank

Surgery carries them over, files for models without adapters get W.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext.layers.every import every_layer


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of a layer.

    Attributes:
        layer: that has it.
        weight: W0, the kernel or the table of the layer, which does not train.
        name: of A and B among the attributes of the layer, without "_a" and "_b".
    """

    layer: keras.layers.Layer
    weight: keras.Variable
    name: str

    @property
    def a(self) -> keras.Variable:
        return getattr(self.layer, f"{self.name}_a")

    @property
    def b(self) -> keras.Variable:
        return getattr(self.layer, f"{self.name}_b")

    @property
    def scale(self) -> float:
        return self.layer.lora_alpha / self.layer.lora_rank

    def merged(self) -> np.ndarray:
        """W, in the dtype of W0."""
        start = ops.convert_to_numpy(self.weight)
        # In float64, so that W is W0 + s A B rounded once.
        a, b = (ops.convert_to_numpy(x).astype("float64") for x in (self.a, self.b))
        return (start.astype("float64") + self.scale * (a @ b)).astype(start.dtype)


def base_weight(layer: Any) -> keras.Variable | None:
    """W0 of a layer that can have an adapter, None of any other."""
    if not (hasattr(layer, "enable_lora") and layer.built):
        return None
    names = "kernel", "embeddings"
    return next((weight for weight in layer.weights if weight.name in names), None)


def adapters(network: Any) -> list[Adapter]:
    """The adapters of a layer or model, also of what is inside."""
    found = []
    for layer in (network, *every_layer(network)):
        weight = base_weight(layer)
        if weight is not None and layer.lora_enabled:
            found.append(Adapter(layer, weight, f"lora_{weight.name}"))
    return found


def merged_weights(
    network: Any,
) -> list[tuple[keras.Variable, Callable[[], np.ndarray]]]:
    """The weights that a network has without its adapters, and how to get their values."""
    found = adapters(network)
    apart = {id(x) for adapter in found for x in (adapter.a, adapter.b)}
    merged = {id(adapter.weight): adapter.merged for adapter in found}

    def values(weight: keras.Variable) -> Callable[[], np.ndarray]:
        return merged.get(id(weight), lambda: ops.convert_to_numpy(weight))

    return [(weight, values(weight)) for weight in network.weights if id(weight) not in apart]


def adapt_like(old: Any, new: Any) -> None:
    """Adapters for a layer, or copies of layers in it, where the original has them.

    A layer that has no counterpart of the same shape is passed over. Values of A and B are not
    set, but the scale is, which Keras loses where a configuration has a rank.
    """
    twins: dict[str, Any] = {_within(new, x): x for x in (new, *every_layer(new))}
    for adapter in adapters(old):
        twin = twins.get(_within(old, adapter.layer))
        weight = base_weight(twin)
        if twin is None or weight is None:
            continue
        if weight.shape == adapter.weight.shape and not twin.lora_enabled:
            twin.enable_lora(adapter.layer.lora_rank)
        if twin.lora_enabled:
            twin.lora_alpha = adapter.layer.lora_alpha


def _within(layer: Any, part: Any) -> str:
    """The path of a part of a layer, whatever that is called."""
    return str(part.path).removeprefix(str(layer.path))


def check_untrained(model: keras.Model) -> None:
    """Refuse other weights under adapters that were trained on those of now.

    Raises:
        ValueError: an adapter has moved from its start, B = 0.
    """
    trained = [x.layer.path for x in adapters(model) if np.any(ops.convert_to_numpy(x.b))]
    if trained:
        raise ValueError(
            f"{model.name} has adapters that were trained on the weights it has now: in "
            f"{trained[0]} and {len(trained) - 1} more layers. Load the checkpoint into a "
            "model without adapters, then load_lora(model, directory)."
        )


def check_not_quantized(network: Any, doing: str) -> None:
    """Refuse what needs weights that are numbers, and not codes with a scale beside them.

    Raises:
        ValueError: a layer is quantised.
    """
    for layer in (network, *every_layer(network)):
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"{doing} needs the weights as they were, and {layer.path} is quantised "
                f"({mode}). Do it before model.quantize; model.save keeps a quantised model."
            )
