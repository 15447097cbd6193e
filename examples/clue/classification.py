"""A class for every text or pair: pooled last layer, one dense softmax layer, accuracy.

The head of the reference code, which takes [CLS] ("first"), has no pooler and no further
dropout. Models give logits.
"""

import keras
import numpy as np
from data import Rows, Split, TaskData
from keras import ops
from settings import Settings

from keras_ext.text import WordPieceTokenizer

# What decides which epoch is the best, of the figures that `score` gives.
METRIC = "accuracy"

# Logits have one shape for all batches and are kept as they are.
decode = None


def encode(
    tokenizer: WordPieceTokenizer, split: Split, data: TaskData, settings: Settings
) -> Rows:
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP]; one-hot labels."""
    texts, pairs = split.inputs, None
    if not isinstance(texts[0], str):
        texts, pairs = zip(*texts, strict=True)
    encodings = tokenizer.encode_batch(texts, pairs, max_length=settings.max_length)
    targets = None
    if split.answers is not None:
        targets = np.eye(len(data.labels), dtype="float32")[split.answers]
    return Rows([encoding.token_ids for encoding in encodings], targets)


def build_model(
    encoder: keras.Model, data: TaskData, settings: Settings
) -> tuple[list, keras.KerasTensor]:
    """Inputs and logits (batch, classes) of the encoder with a classifier on top."""
    vector = pool(encoder.output, encoder.inputs[0], settings.pooling)  # (batch, hidden)
    vector = keras.layers.Dropout(settings.head_dropout, name="head_dropout")(vector)
    classifier = keras.layers.Dense(
        len(data.labels),
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        name="classifier",
    )
    return encoder.inputs, classifier(vector)


def pool(
    hidden: keras.KerasTensor, token_ids: keras.KerasTensor, kind: str
) -> keras.KerasTensor:
    """(batch, length, hidden) to (batch, hidden), where token id 0 is padding.

    Args:
        kind: "first", "last", "mean" or "max" over the tokens of a text.
    """
    if kind == "first":
        return hidden[:, 0]
    if kind == "last":
        number = ops.sum(ops.cast(ops.not_equal(token_ids, 0), "int32"), axis=1)
        last = ops.maximum(number - 1, 0)[:, None, None]
        return ops.squeeze(ops.take_along_axis(hidden, last, axis=1), 1)
    mask = ops.expand_dims(ops.not_equal(token_ids, 0), axis=-1)  # (batch, length, 1)
    if kind == "max":
        return ops.max(ops.where(mask, hidden, float("-inf")), axis=1)
    weights = ops.cast(mask, hidden.dtype)
    return ops.sum(hidden * weights, axis=1) / ops.sum(weights, axis=1)


def compile_arguments(settings: Settings) -> dict:
    """Loss and metrics over real rows only: padded ones have sample weight zero."""
    return {
        "loss": keras.losses.CategoricalCrossentropy(
            from_logits=True,
            label_smoothing=settings.label_smoothing,
            reduction="mean_with_sample_weight",
        ),
        "weighted_metrics": [
            keras.metrics.CategoricalCrossentropy(
                from_logits=True, label_smoothing=settings.label_smoothing, name="crossentropy"
            ),
            keras.metrics.CategoricalAccuracy(name="accuracy"),
        ],
    }


def score(logits: np.ndarray, split: Split, rows: Rows) -> dict[str, float]:
    """Loss and accuracy over the rows of a split."""
    logits = logits.astype("float64")
    top = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    true = logits[np.arange(len(split)), split.answers]
    return {
        "loss": float(np.mean(log_sums - true)),
        "accuracy": float(np.mean(logits.argmax(axis=1) == split.answers)),
    }


def predictions(logits: np.ndarray, split: Split, rows: Rows, data: TaskData) -> list[str]:
    """The label code of every row."""
    return [data.labels[index] for index in logits.argmax(axis=1)]
