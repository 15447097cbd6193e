"""Entities by GlobalPointer: a score for each span and type, an entity where it is positive.

The head of the reference code. Entities may overlap.
"""

import entities
import keras
import numpy as np
from data import Rows, Split, TaskData
from entities import Entity
from mean_loss import MeanLoss
from settings import Settings

from keras_ext.layers import GlobalPointer
from keras_ext.losses import MultilabelCrossentropy
from keras_ext.text import WordPieceTokenizer

METRIC, score, predictions = entities.METRIC, entities.score, entities.predictions


def encode(
    tokenizer: WordPieceTokenizer, split: Split, data: TaskData, settings: Settings
) -> Rows:
    """[CLS] text [SEP]; lists of spans in tokens, (rows, types, most of a row, 2)."""
    encodings, answers = entities.align(tokenizer, split, settings)
    targets = None if answers is None else span_lists(answers, len(data.labels))
    return Rows([x.token_ids for x in encodings], targets, [x.offsets for x in encodings])


def build_model(
    encoder: keras.Model, data: TaskData, settings: Settings
) -> tuple[list, keras.KerasTensor]:
    """Inputs and scores (batch, types, length, length)."""
    hidden = keras.layers.Dropout(settings.head_dropout, name="head_dropout")(encoder.output)
    return encoder.inputs, GlobalPointer(len(data.labels), name="global_pointer")(hidden)


def compile_arguments(settings: Settings) -> dict:
    """The loss is the mean over texts and types; padded rows have weight zero."""
    loss = MultilabelCrossentropy(
        class_axes=2, sparse=True, reduction="mean_with_sample_weight"
    )
    return {"loss": loss, "weighted_metrics": [MeanLoss(loss, name="crossentropy")]}


def decode(scores: np.ndarray) -> list[list[Entity]]:
    """The entities of each row, in tokens."""
    return [[Entity(*found) for found in np.argwhere(row > 0).tolist()] for row in scores]


def span_lists(answers: list[list[Entity]], types: int) -> np.ndarray:
    """(rows, types, most entities of a type in a row, 2), filled up with -1."""
    spans = [[[] for _ in range(types)] for _ in answers]
    for row, answer in zip(spans, answers, strict=True):
        for kind, start, end in answer:
            row[kind].append((start, end))
    most = max(len(found) for row in spans for found in row)
    lists = np.full((len(answers), types, max(most, 1), 2), -1, "int32")
    for index, row in enumerate(spans):
        for kind, found in enumerate(row):
            if found:
                lists[index, kind, : len(found)] = found
    return lists
