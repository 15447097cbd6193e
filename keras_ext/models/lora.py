"""LoRA: train small adapters of some layers in the place of a Transformer's weights.

    W = W0 + s A B,    A (inputs, r), B (r, units), s = alpha / r

A starts random and B with zeros, so the model is what it was; W0 is frozen. Adapters are those
of Keras (`layer.enable_lora`), their files those of peft:

    add_lora      adapters for a model, whose own weights are frozen
    merge_lora    W for W0, and no adapters any more
    save_lora     `adapter_model.safetensors` and `adapter_config.json`
    load_lora     what save_lora or peft wrote

Cost: r (inputs + units) weights in training for each layer instead of inputs · units, and for
each step the product A B.

Source: Hu et al. 2021, arXiv 2106.09685; github.com/huggingface/peft.
"""

import os
from collections.abc import Iterable, Sequence

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.layers.every import every_layer
from keras_ext.models.adapter import Adapter, adapters, base_weight, check_not_quantized
from keras_ext.models.peft_files import read_adapters, write_adapters
from keras_ext.models.record import family_of
from keras_ext.optimizers.selection import Selectable, Selection


def add_lora(
    model: keras.Model,
    rank: int,
    targets: Selectable | Sequence[Selectable] = ("query_dense", "value_dense"),
    alpha: float | None = None,
) -> None:
    """Give layers of a Transformer adapters, and freeze all weights that its family has.

    A and B train, and so do layers of your own on its outputs. What else shall train is thawed
    weight by weight (`weight.trainable = True`). Compile the model afterwards.

    Adapters are not in `.keras` and `.weights.h5` files: Keras merges them there, so that the
    outputs are the same, and sets those of a model that loads such a file to zeros, which never
    train. Nor does `keras.models.clone_model` copy them. `save_lora` keeps them.

    Args:
        model: of `build_transformer_model`, or a functional model on its outputs; changed in
            place.
        rank: r, at least 1.
        targets: layers, or regular expressions searched in the paths of the kernels and tables
            of layers with an `enable_lora` (`Dense`, embeddings): "dense/" means all
            projections, r"encoder_1[01]/.*(query|value)_dense/" those of two blocks. Default:
            queries and values of all attentions, as in the paper and for BERT and T5 in peft.
        alpha: of the scale s = alpha / r. Default: r, so that s = 1.

    Raises:
        ValueError: a number is out of range, a target fits no layer, or a layer has an adapter
            or a constraint already; nothing is changed then.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> classifier = keras.Model(bert.inputs, keras.layers.Dense(2)(bert.output[:, 0]))
        >>> add_lora(classifier, rank=8, alpha=16)
        >>> len(classifier.trainable_weights)  # A and B of two layers, the head
        6

    Reference: Hu et al. 2021, arXiv 2106.09685.
    """
    rank = arguments.integer("rank", rank)
    alpha = float(rank if alpha is None else arguments.number("alpha", alpha, "(0, inf)"))
    possible = _possible(model)
    paths = Selection("targets", targets).indices([base_weight(x) for x in possible.values()])
    chosen = [[*possible.values()][i] for i in paths]
    for layer in chosen:
        if layer.lora_enabled:
            raise ValueError(f"{layer.path} has an adapter already: merge_lora(model) first.")
    _check_adaptable(chosen)
    _freeze(model)
    for layer in chosen:
        layer.enable_lora(rank, lora_alpha=alpha)
    _forget_programs(model)


def merge_lora(model: keras.Model) -> None:
    """Put W = W0 + s A B in the place of W0, and take the adapters away.

    The outputs stay what they are. All weights train again, but those of layers that have
    `trainable = False`. Compile the model afterwards.

    Args:
        model: with adapters, of `add_lora`, `load_lora` or Keras; changed in place.

    Raises:
        ValueError: it has none, or is quantised.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> add_lora(bert, rank=8)
        >>> merge_lora(bert)
        >>> len(bert.trainable_weights) == len(bert.weights)
        True
    """
    check_not_quantized(model, "merge_lora")
    for adapter in _adapters(model):
        adapter.weight.assign(adapter.merged())
        # Programs that were compiled with the adapter, of models around this one, go on to add
        # it.
        adapter.b.assign(ops.zeros(adapter.b.shape))
        layer, factors = adapter.layer, (adapter.a, adapter.b)
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
        for factor, side in zip(factors, "ab", strict=True):
            # Private: `delattr` does the same, and collects garbage for half a second.
            layer._untrack_variable(factor)
            setattr(layer, f"{adapter.name}_{side}", None)
    layers = [(layer, layer.trainable) for layer in (model, *every_layer(model))]
    for layer, trainable in layers:  # those outside first, which set those inside
        layer.trainable = not trainable  # TensorFlow passes over what changes nothing
        layer.trainable = trainable
    _forget_programs(model)


def save_lora(model: keras.Model, directory: str | os.PathLike) -> None:
    """Write the adapters of a model as peft does, `adapter_model.safetensors` and
    `adapter_config.json`.

    `load_lora` reads them, and `peft.PeftModel.from_pretrained(base, directory)`, where `base`
    is the class of transformers with the same names: one with a head where there are such, as
    `BertForMaskedLM` or `BertForSequenceClassification`. The model's own weights are not
    written.

    Args:
        model: of a family (see `family_of`), with adapters.
        directory: where to; made if need be.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: the model has no adapters, or one of an embedding, which peft would not
            apply to a head that is tied to it, or of a layer that its family does not have.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> add_lora(bert, rank=8)
        >>> save_lora(bert, "adapter")
    """
    write_adapters(directory, _adapters(model), family_of(model).names["huggingface"])


def load_lora(model: keras.Model, directory: str | os.PathLike) -> None:
    """Give a model the adapters that `save_lora` or peft wrote, and freeze it as `add_lora`.

    Dropout that the adapters were trained with is not applied. Compile the model afterwards.

    Args:
        model: of a family (see `family_of`), with the weights that the adapters were trained
            on; changed in place. Adapters of the same layers and rank are replaced.
        directory: with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: a file is absent.
        ValueError: the adapters are not plain LoRA (DoRA, rsLoRA, ranks by pattern, biases,
            `modules_to_save` and the like are named), do not fit the model, or it has others;
            nothing is changed then.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> add_lora(bert, rank=8)
        >>> save_lora(bert, "adapter")
        >>> same = build_transformer_model("bert_config.json")
        >>> load_lora(same, "adapter")
    """
    layers = _possible(model)
    table = family_of(model).names["huggingface"]
    found, rank, alpha = read_adapters(directory, [*layers.values()], table)
    others = [
        x.layer.path
        for x in adapters(model)
        if x.layer.path not in found or x.layer.lora_rank != rank
    ]
    if others:
        raise ValueError(
            f"{model.name} has other adapters than {os.fspath(directory)}, in {others[0]} and "
            f"{len(others) - 1} more layers. merge_lora(model) first, or take a model without."
        )
    _check_adaptable(layers[path] for path in found)
    _freeze(model)
    for path, (a, b) in found.items():
        layer = layers[path]
        if not layer.lora_enabled:
            layer.enable_lora(rank)
        layer.lora_alpha = alpha
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)
    _forget_programs(model)


def _possible(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The layers that can have an adapter, by their paths."""
    return {x.path: x for x in every_layer(model) if base_weight(x) is not None}


def _adapters(model: keras.Model) -> list[Adapter]:
    found = adapters(model)
    if not found:
        raise ValueError(f"{model.name} has no adapters: add_lora(model, rank) makes them.")
    return found


def _check_adaptable(layers: Iterable[keras.layers.Layer]) -> None:
    for layer in layers:
        for name in ("kernel_constraint", "embeddings_constraint"):
            if getattr(layer, name, None) is not None:
                raise ValueError(f"{layer.path} has a {name}: Keras has no adapter for it.")


def _freeze(model: keras.Model) -> None:
    """All weights that the family has names for."""
    tables = family_of(model).names.values()
    for weight in model.weights:
        if any(table.source(weight.path) is not None for table in tables):
            weight.trainable = False


def _forget_programs(model: keras.Model) -> None:
    # As Keras itself does in `quantize`: TensorFlow would go on with what it traced.
    model.train_function = model.test_function = model.predict_function = None
