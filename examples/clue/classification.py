"""A class for every text: pooled last layer, one dense softmax layer, accuracy.

The head of the reference code, which takes [CLS] ("first"), has no pooler and no further
dropout. Models give logits.
"""

import keras
import numpy as np
from data import Split, TaskData
from keras import ops
from settings import Settings


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
        kind: "first", "mean" or "max" over the tokens of a text.
    """
    if kind == "first":
        return hidden[:, 0]
    mask = ops.expand_dims(ops.not_equal(token_ids, 0), axis=-1)  # (batch, length, 1)
    if kind == "max":
        return ops.max(ops.where(mask, hidden, float("-inf")), axis=1)
    weights = ops.cast(mask, hidden.dtype)
    return ops.sum(hidden * weights, axis=1) / ops.sum(weights, axis=1)


def targets(split: Split, data: TaskData) -> np.ndarray:
    """One-hot labels (examples, classes), float32."""
    return np.eye(len(data.labels), dtype="float32")[split.classes]


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


def score(logits: np.ndarray, split: Split) -> dict[str, float]:
    """Loss and accuracy over the rows of a split; accuracy decides which epoch is best."""
    logits = logits.astype("float64")
    top = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    true = logits[np.arange(len(split)), split.classes]
    return {
        "loss": float(np.mean(log_sums - true)),
        "accuracy": float(np.mean(logits.argmax(axis=1) == split.classes)),
    }


def predictions(logits: np.ndarray, data: TaskData) -> list[str]:
    """The label code of every row."""
    return [data.labels[index] for index in logits.argmax(axis=1)]
