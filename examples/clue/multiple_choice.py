"""One of several choices: each is a row of its own, and a softmax over the rows decides.

Inputs are (batch, choices, length). Rows are scored one by one: encoder, pooling, one dense
unit, as in the reference code. An example with fewer choices than others of its file is filled
up by rows of only [CLS], which are masked: they have no probability and no gradient. The number
of choices need not be that of training.

An example of such a task has

    choices                             the texts to choose from
    rows(tokenizer, ids, max_length)    the token ids of every choice, where `ids` has those of
                                        all texts of the example, without special ones around

and iterates over its texts, as the inputs of every split do.
"""

from dataclasses import replace

import classification
import keras
import numpy as np
from classification import METRIC, decode, pool, predictions, score
from data import Rows, Split, TaskData
from errors import UserError
from keras import ops
from settings import Settings

from keras_ext.text import WordPieceTokenizer

__all__ = [
    "METRIC",
    "build_model",
    "compile_arguments",
    "decode",
    "encode",
    "predictions",
    "score",
]

SHORTEST = 8  # the special tokens, and a little
CHUNK = 1000  # examples to encode at once: tokens take more memory than rows
NEVER = -1e30  # not infinite: zero times infinity, in the crossentropy, is NaN


def encode(
    tokenizer: WordPieceTokenizer, split: Split, data: TaskData, settings: Settings
) -> Rows:
    """An array of (choices, length) an example, filled up; targets of (choices,)."""
    if settings.max_length < SHORTEST:
        raise UserError(
            f"max_length must be at least {SHORTEST} for this task, got {settings.max_length}"
        )
    width = max(len(example.choices) for example in split.inputs)
    token_ids = []
    for start in range(0, len(split), CHUNK):
        examples = split.inputs[start : start + CHUNK]
        texts = list(dict.fromkeys(Split(examples).texts()))
        encodings = tokenizer.encode_batch(texts)
        ids = {
            text: encoding.token_ids[1:-1]
            for text, encoding in zip(texts, encodings, strict=True)
        }
        rows = [example.rows(tokenizer, ids, settings.max_length) for example in examples]
        token_ids += [_fill(row, width, tokenizer.token_to_id("[CLS]")) for row in rows]
    if split.answers is None:
        return Rows(token_ids)
    return Rows(token_ids, _targets(split, width, settings.label_smoothing))


def build_model(
    encoder: keras.Model, data: TaskData, settings: Settings
) -> tuple[list, keras.KerasTensor]:
    """Inputs of (batch, choices, length) and logits (batch, choices)."""
    inputs = [
        keras.Input((None, None), dtype="int32", name=name)
        for name in ("token_ids", "segment_ids")
    ]
    rows = [FlattenChoices(name=f"flat_{x.name}")(x) for x in inputs]
    vector = pool(encoder(rows), rows[0], settings.pooling)  # (batch * choices, hidden)
    vector = keras.layers.Dropout(settings.head_dropout, name="head_dropout")(vector)
    scorer = keras.layers.Dense(
        1, kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="scorer"
    )
    return inputs, ChoiceLogits(name="logits")(scorer(vector), inputs[0])


def compile_arguments(settings: Settings) -> dict:
    """Loss and metrics as in classification; `encode` has smoothed the targets."""
    return classification.compile_arguments(replace(settings, label_smoothing=0.0))


@keras.saving.register_keras_serializable(package="keras_ext_clue")
class FlattenChoices(keras.layers.Layer):
    """(batch, choices, length) to (batch * choices, length)."""

    def call(self, ids):
        return ops.reshape(ids, (-1, ops.shape(ids)[2]))

    def compute_output_spec(self, ids):
        return keras.KerasTensor((None, ids.shape[2]), dtype=ids.dtype)


@keras.saving.register_keras_serializable(package="keras_ext_clue")
class ChoiceLogits(keras.layers.Layer):
    """Scores (batch * choices, 1) to logits (batch, choices), missing choices masked.

    A missing choice is a row of one token.
    """

    def call(self, scores, token_ids):
        logits = ops.reshape(ops.cast(scores, "float32"), ops.shape(token_ids)[:2])
        return ops.where(ops.equal(token_ids[:, :, 1], 0), NEVER, logits)

    def compute_output_spec(self, scores, token_ids):
        return keras.KerasTensor(token_ids.shape[:2], dtype="float32")


def _fill(rows: list[list[int]], width: int, cls: int) -> np.ndarray:
    """One array of the choices, and of rows of only [CLS] up to `width`."""
    filled = np.zeros((width, max(map(len, rows))), "int32")
    filled[:, 0] = cls
    for index, ids in enumerate(rows):
        filled[index, : len(ids)] = ids
    return filled


def _targets(split: Split, width: int, smoothing: float) -> np.ndarray:
    """One-hot, smoothed over the choices that an example has."""
    counts = np.array([[len(example.choices)] for example in split.inputs])
    even = (np.arange(width) < counts) / counts
    chosen = np.eye(width)[split.answers]
    return ((1 - smoothing) * chosen + smoothing * even).astype("float32")
