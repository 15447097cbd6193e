"""A functional model built again on copies of its layers, some of them changed."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_ext.layers.blocks import Side, blocks
from keras_ext.models.adapter import adapt_like, check_not_quantized


def blocks_of(model: keras.Model, side: Side | None = None) -> list[keras.layers.Layer]:
    """The blocks of a functional model that can be changed, being layers of its own graph.

    Raises:
        ValueError: it has none, or they are within a model in it.
    """
    found, own = blocks(model, side), {id(layer) for layer in model.layers}
    for block in found:
        if id(block) not in own:
            raise ValueError(
                f"{block.name} is a layer of a model within {model.name}. Build heads on the "
                "output: Model(bert.inputs, head(bert.output)), not head(bert(inputs))."
            )
    return found


def rebuild(
    model: keras.Model,
    call: Callable[..., Any],
    copies: Iterable[tuple] = (),
    inputs: list[keras.KerasTensor] | None = None,
    name: str | None = None,
    further: Iterable[keras.KerasTensor] = (),
) -> keras.Model:
    """The same graph on copies of all layers, except where `call(layer, *args)` gives outputs.

    Args:
        copies: pairs of layers that `call` made, known once the graph is complete; the second
            gets what `carry` carries.
        inputs: what the graph starts from. Default: new inputs of the same names.
        name: of the model. Default: that of `model`.
        further: inputs that only `call` uses.

    Raises:
        ValueError: the model is quantised.
    """
    check_not_quantized(model, "Surgery")
    if further:
        inputs = [*(inputs or [_like(x) for x in model.inputs]), *further]
    copied: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    made: dict[int, Any] = {}

    def call_copy(layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = call(layer, *args, **kwargs)
        if outputs is not None:
            return outputs
        if id(layer) not in made:  # a tied layer is called twice
            made[id(layer)] = copy_layer(layer)
            if isinstance(layer, keras.layers.Layer):
                copied.append((layer, made[id(layer)]))
        return made[id(layer)](*args, **kwargs)

    # A new model of the same graph is not compiled; Keras would compile the clone as well.
    # Older Keras wants every input to lead to an output.
    outputs = (
        [model.output, *map(keras.layers.Identity(), further)] if further else model.output
    )
    rebuilt = keras.models.clone_model(
        keras.Model([*model.inputs, *further], outputs, name=name or model.name),
        input_tensors=inputs,
        clone_function=lambda layer: layer,
        call_function=call_copy,
    )
    if further:
        rebuilt = keras.Model(rebuilt.input, rebuilt.output[0], name=rebuilt.name)
    for layer, copy in (*copied, *copies):
        carry(layer, copy)
    return rebuilt


def carry(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Give a copy of a layer its adapters, its weights, and which of them are frozen."""
    adapt_like(old, new)
    new.set_weights(old.get_weights())
    for known, weight in zip(old.weights, new.weights, strict=True):
        weight.trainable = weight.trainable and known.trainable


def carry_fitting(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """The same for a layer with other parts: what has the path and shape that it had."""
    adapt_like(old, new)
    values = {weight.path: weight for weight in old.weights}
    for weight in new.weights:
        known = values.get(weight.path)
        if known is not None and known.shape == weight.shape:
            weight.assign(known)
            weight.trainable = weight.trainable and known.trainable


def _like(x: keras.KerasTensor) -> keras.KerasTensor:
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)


def copy_layer(layer: Any, **changes: Any) -> Any:
    """The layer or operation anew, with changes to its configuration; weights are fresh."""
    return type(layer).from_config({**layer.get_config(), **changes})
