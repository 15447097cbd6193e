"""From what a tokenizer of transformers returns to the inputs of a model here.

A model here finds padding in the token ids themselves, transformers in an attention mask beside
them. So ids that the mask hides become the id of padding; what no id can say is refused.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_ext.layers.embeddings import TokenEmbedding
from keras_ext.layers.every import every_layer

# Key of an encoding -> input of a model.
INPUTS = {
    "input_ids": "token_ids",
    "token_type_ids": "segment_ids",
    "position_ids": "position_ids",
    "decoder_input_ids": "decoder_token_ids",
}
MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


def model_inputs(model: keras.Model, encoding: Mapping[str, Any]) -> Any:
    """Turn an encoding of transformers into inputs of a model, for its call, fit and predict.

        token_ids = where(attention_mask, input_ids, id of padding)

    Where a model counts its positions without padding (RoBERTa), has no padding (GPT), or this
    is its decoder, a mask may only hide the ends of texts, which nothing before them sees.
    Segments that are not given are zeros, positions 0 ... length - 1.

    Args:
        model: of `build_transformer_model`, or around such a model.
        encoding: `BatchEncoding` or dict with `input_ids` and, if need be, `attention_mask`,
            `token_type_ids`, `position_ids`, `decoder_input_ids`, `decoder_attention_mask`:
            integers (batch, length), lists or arrays of any kind; of one text also (length,).

    Returns:
        int32 (batch, length), a list of several in the order of `model.inputs`.

    Raises:
        ValueError: the model has no use for a key, or lacks one, shapes differ, texts are not
            padded to one length, or the mask says what no ids can.

    Example:
        >>> encoding = {"input_ids": [[2, 5, 3, 8]], "attention_mask": [[1, 1, 1, 0]]}
        >>> token_ids, segment_ids = model_inputs(bert, encoding)
        >>> token_ids
        array([[2, 5, 3, 0]], dtype=int32)
    """
    names = [x.name for x in model.inputs]
    arrays = {key: _array(key, value) for key, value in encoding.items()}
    for key in arrays:
        if INPUTS.get(MASKS.get(key, key)) not in names and not (
            key == "token_type_ids" and not arrays[key].any()
        ):
            raise ValueError(
                f"encoding holds {key}, but {model.name} has only the inputs "
                f"{', '.join(names)}. Leave {key} out."
            )
    for mask, key in MASKS.items():
        if mask in arrays:
            if key not in arrays:
                raise ValueError(f"encoding holds {mask}, but no {key}. Give both.")
            arrays[key] = _masked(model, key, arrays[key], mask, arrays[mask])
    inputs = {name: arrays[key] for key, name in INPUTS.items() if key in arrays}
    if "token_ids" in inputs:
        shape = inputs["token_ids"].shape
        inputs.setdefault("segment_ids", np.zeros(shape, "int32"))
        inputs.setdefault("position_ids", np.broadcast_to(np.arange(shape[1]), shape))
        if _counted(model) and "position_ids" in names:
            raise ValueError(
                f"{model.name} must be without custom_position_ids, as it counts its positions "
                "from the id of padding. Give its inputs yourself, or build it without."
            )
        for name in ("segment_ids", "position_ids"):
            if inputs[name].shape != shape:
                raise ValueError(
                    f"{name} must be {shape} as token_ids, got {inputs[name].shape}."
                )
    keys = {name: key for key, name in INPUTS.items()}
    for name in names:
        if name not in inputs:
            raise ValueError(
                f"encoding lacks {keys.get(name, name)!r}, which {model.name} takes as {name}."
            )
    found = [inputs[name] for name in names]
    return found if len(found) > 1 else found[0]


def _counted(model: keras.Model) -> bool:
    """Whether positions are those among the tokens that are no padding."""
    return any(getattr(layer, "counts_tokens", False) for layer in every_layer(model))


def _array(key: str, value: Any) -> np.ndarray:
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    try:
        array = np.asarray(value)
    except ValueError:  # NumPy's, of rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biu" or array.ndim not in (1, 2):
        raise ValueError(
            f"{key} must be integers (batch, length), texts padded to one length "
            f"(padding=True of the tokenizer), got an array of {array.dtype} {array.shape}."
        )
    return np.atleast_2d(array).astype("int32")


def _masked(
    model: keras.Model, key: str, ids: np.ndarray, name: str, mask: np.ndarray
) -> np.ndarray:
    """Ids in which what the mask hides is padding."""
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{name} must be 0 or 1 and {ids.shape} as {key}, got {mask.shape} with values "
            f"from {mask.min(initial=0)} to {mask.max(initial=0)}."
        )
    embeddings = [layer for layer in every_layer(model) if isinstance(layer, TokenEmbedding)]
    if key == "decoder_input_ids" or not all(layer.mask_zero for layer in embeddings):
        if (np.diff(mask, axis=1) > 0).any():
            raise ValueError(
                f"{name} must hide only the ends of texts for {model.name}, whose {key} have "
                "no padding. Pad on the right."
            )
        return ids
    if len({layer.padding_id for layer in embeddings}) != 1:
        raise ValueError(f"{model.name} must have one token embedding, got {len(embeddings)}.")
    padding = embeddings[0].padding_id
    if ((ids == padding) & (mask == 1)).any():
        raise ValueError(
            f"{name} must be 0 where {key} are {padding}, which is padding to {model.name}."
        )
    if (
        _counted(model)
        and (np.diff(mask, axis=1) > 0).any()
        and ((ids != padding) != mask).any()
    ):
        raise ValueError(
            f"{name} must be 1 for all {key} but {padding}, which is padding to {model.name}, "
            "or hide only the ends of texts: positions are counted without padding."
        )
    return np.where(mask == 1, ids, padding).astype("int32")
