"""Objectives that change the value of a weight matrix, or of a layer's output."""

from typing import Any, Literal

import keras
from keras import ops

from keras_ext.arguments import choice
from keras_ext.layers.every import find_layer
from keras_ext.numerics import scaled_norm
from keras_ext.training.objective import Objective
from keras_ext.training.step import Step


class OnLayer(Objective):
    """Base of the objectives on an embedding.

    Args:
        layer: the name (or the path) of the layer.
        on: "matrix", its matrix of embeddings, or "output", what it returns.
    """

    def __init__(self, layer: str, on: Literal["matrix", "output"]) -> None:
        if not isinstance(layer, str):
            raise ValueError(f"layer must be the name of a layer, got {layer!r}.")
        self.layer = layer
        self.on = choice("on", on, ("matrix", "output"))
        self.layers = () if on == "matrix" else (layer,)

    def check(self, model: keras.Model) -> None:
        self._target(model)

    def target(self, step: Step) -> keras.Variable | keras.Layer:
        """What `step.value` and its relatives take."""
        return self._target(step.model)

    def _target(self, model: keras.Model) -> keras.Variable | keras.Layer:
        layer = find_layer(model, self.layer)
        if self.on == "output":
            return layer
        matrix = getattr(layer, "embeddings", None)
        if isinstance(matrix, keras.Variable):
            return matrix
        raise ValueError(
            f'on="matrix" is for an Embedding, got layer={self.layer!r}, of which `embeddings` '
            f'is {matrix!r}. Use on="output".'
        )

    def get_config(self) -> dict[str, Any]:
        return {"layer": self.layer, "on": self.on}


def to_length(structure: Any, length: float) -> Any:
    """A vector of this Euclidean length, over all tensors of the structure. 0 stays 0."""
    present = scaled_norm(ops.stack([scaled_norm(t) for t in keras.tree.flatten(structure)]))
    nothing = ops.equal(present, 0)
    present = ops.where(nothing, ops.ones_like(present), present)
    return keras.tree.map_structure(lambda t: length * (t / present), structure)
