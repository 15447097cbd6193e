"""What a model learns from rows of token ids: inputs, targets, and which of them count.

    mlm     masked words, from all around them                   masking.py
    lm      each token, from those before it
    unilm   each token behind a prefix, from that and what is between

The prefix ends at a place drawn evenly among those of the row, anew in every epoch. A model
with an encoder reads it there, with padding behind, and the rest as the text of its decoder.
"""

import dataclasses
from typing import Any, NamedTuple

import keras
import numpy as np
from errors import UserError
from keras import ops
from masking import WordMasking, places

from keras_ext.models import FAMILIES


class Rows(NamedTuple):
    """What the model reads, in the order of its inputs, and is to predict: (rows, length)."""

    inputs: tuple[np.ndarray, ...]
    targets: np.ndarray
    weights: np.ndarray

    def batch(self) -> tuple:
        """Inputs, targets and weights for Keras."""
        return self


class NextTokens:
    """Targets of a language model.

    Args:
        names: of the inputs of the model.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, rows: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> Rows:
        """As `WordMasking`; words make no difference, and nothing is drawn."""
        inputs = {"token_ids": rows, "segment_ids": np.zeros_like(rows)}
        targets = shifted(rows, 1)
        return Rows(
            tuple(inputs[name] for name in self.names), targets, np.float32(targets != 0)
        )


class AfterPrefix:
    """Targets of a UniLM, or of a model with an encoder; see `NextTokens`."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, rows: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> Rows:
        """As `WordMasking`; words make no difference."""
        sizes = np.count_nonzero(rows, axis=1)
        prefix = rng.integers(1, np.maximum(sizes, 2))[:, None]
        behind = np.arange(rows.shape[1]) >= prefix
        inputs = {"token_ids": rows, "segment_ids": np.int32(behind & (rows != 0))}
        targets = shifted(rows, 1)
        weights = shifted(behind, 1) & (targets != 0)
        if "decoder_token_ids" in self.names:
            targets = shifted(rows, prefix)
            inputs = {
                "token_ids": np.where(behind, 0, rows),
                "decoder_token_ids": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            }
            weights = targets != 0
        return Rows(tuple(inputs[name] for name in self.names), targets, np.float32(weights))


def shifted(rows: np.ndarray, by: Any) -> np.ndarray:
    """What comes so many places later, 0 behind the end."""
    places = np.arange(rows.shape[1]) + by
    found = np.take_along_axis(rows, np.broadcast_to(places, rows.shape) % rows.shape[1], 1)
    return np.where(places < rows.shape[1], found, 0).astype(rows.dtype)


def build_model(sizes: dict[str, Any], family: str, task: str) -> keras.Model:
    """The model of a task, from its inputs to its logits.

    Of "mlm" it maps `[token_ids, segment_ids, positions]` to logits (batch, places,
    vocabulary): of a small model on a CPU the projection of all positions to the vocabulary
    would take most of the time, so those to predict are picked out before it.
    """
    try:
        transformer = FAMILIES[family].from_config(sizes)
        if task != "mlm":
            model = transformer.build(with_mlm=True)
            return keras.Model(model.inputs, model.outputs[1])
    except ValueError as error:
        raise UserError(f"{error}") from error
    trunk = transformer.trunk()
    length = sizes["max_position_embeddings"]
    positions = keras.Input((places(length),), dtype="int32", name="positions")
    hidden = ops.take_along_axis(trunk.hidden, positions[:, :, None], axis=1)
    logits = transformer.mlm(dataclasses.replace(trunk, hidden=hidden))
    return keras.Model([*trunk.inputs, positions], logits)


def application(family: str, task: str) -> dict[str, str]:
    """What of the configuration the task decides."""
    if task == "mlm":
        return {}
    encodes = "seq2seq" in FAMILIES[family].applications
    return {"application": "seq2seq" if encodes else task}


def make_objective(task: str, vocabulary: list[str], model: keras.Model) -> Any:
    """What draws the targets of rows."""
    if task == "mlm":
        return WordMasking(vocabulary)
    kind = {"lm": NextTokens, "unilm": AfterPrefix}[task]
    return kind([x.name for x in model.inputs])
