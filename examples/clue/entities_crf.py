"""Entities by a conditional random field over tags, BIO: begins, inside, outside.

Tag 0 is O; the type t has B, 1 + 2 t, at its first token and I, 2 + 2 t, at the others. Tags
hold no overlapping entities: of such the longest is kept (3 of 23,971 of CLUENER's train are
not). I after anything but B or I of its type is illegal and starts at -10. That also gives
steps which are relative to the size of weights a size to begin with: of zeros they are next to
nothing. Where an illegal I is found all the same, it is outside.
"""

import entities
import keras
import numpy as np
from data import Rows, Split, TaskData
from entities import Entity
from keras import ops
from mean_loss import MeanLoss
from settings import Settings

from keras_ext.layers import CRF, crf_decode, crf_negative_log_likelihood
from keras_ext.text import WordPieceTokenizer, choose_lengths

METRIC, score, predictions = entities.METRIC, entities.score, entities.predictions
ILLEGAL = -10.0


def encode(
    tokenizer: WordPieceTokenizer, split: Split, data: TaskData, settings: Settings
) -> Rows:
    """[CLS] text [SEP]; tags (rows, the greatest length of a batch)."""
    encodings, answers = entities.align(tokenizer, split, settings)
    (length,) = choose_lengths([settings.max_length])
    targets = None if answers is None else np.stack([tags_of(x, length) for x in answers])
    return Rows([x.token_ids for x in encodings], targets, [x.offsets for x in encodings])


def build_model(
    encoder: keras.Model, data: TaskData, settings: Settings
) -> tuple[list, keras.KerasTensor]:
    """Inputs and potentials (batch, tags + 2 + length, tags)."""
    tags = 1 + 2 * len(data.labels)
    hidden = keras.layers.Dropout(settings.head_dropout, name="head_dropout")(encoder.output)
    initializer = keras.initializers.TruncatedNormal(stddev=0.02)
    emissions = keras.layers.Dense(tags, kernel_initializer=initializer, name="emissions")
    crf = Potentials(name="crf")
    outputs = crf(emissions(hidden))
    legal = np.array([[is_legal(i, j) for j in range(tags)] for i in range(tags)])
    crf.transitions.assign(np.where(legal, 0, ILLEGAL))
    crf.start.assign(np.where(legal[0], 0, ILLEGAL))
    return encoder.inputs, outputs


def compile_arguments(settings: Settings) -> dict:
    """The loss is -log p of the tags of a text; padded rows have weight zero."""
    loss = TagLoss(reduction="mean_with_sample_weight")
    return {"loss": loss, "weighted_metrics": [MeanLoss(loss, name="crossentropy")]}


def decode(outputs: np.ndarray) -> list[list[Entity]]:
    """The entities of each row, in tokens."""
    tags = ops.convert_to_numpy(crf_decode(*split_potentials(outputs)))
    return [entities_of(row) for row in tags.tolist()]


@keras.saving.register_keras_serializable(package="keras_ext_clue")
class Potentials(CRF):
    """A CRF that puts its own weights before the emissions: transitions, start and end.

    Loss, metric and decoding then need nothing but the outputs. (On JAX a metric has no access
    to the weights of the model while it is trained.)
    """

    def call(self, inputs, mask=None):
        weights = [self.transitions, self.start[None], self.end[None]]
        weights = ops.concatenate([ops.convert_to_tensor(x) for x in weights])
        rows = ops.broadcast_to(weights, (ops.shape(inputs)[0], *weights.shape))
        emissions = super().call(inputs, mask)
        return ops.concatenate([ops.cast(rows, emissions.dtype), emissions], axis=1)

    def compute_mask(self, inputs, mask=None):
        return None

    def compute_output_shape(self, inputs_shape):
        batch, length, tags = inputs_shape
        return (batch, None if length is None else tags + 2 + length, tags)


def split_potentials(outputs) -> tuple:
    """Emissions, transitions, start, end and mask, as the functions of the CRF take them."""
    tags = outputs.shape[-1]
    weights, emissions = outputs[0, : tags + 2], outputs[:, tags + 2 :]
    return emissions, weights[:tags], weights[tags], weights[-1], emissions[:, :, 0] > -np.inf


class TagLoss(keras.losses.Loss):
    """-log p of tags (batch, any greater length)."""

    def call(self, y_true, y_pred):
        emissions, *others = split_potentials(y_pred)
        tags = y_true[:, : ops.shape(emissions)[1]]
        return crf_negative_log_likelihood(emissions, tags, *others)


def is_legal(tag: int, following: int) -> bool:
    """Whether a tag may follow another: I only after B or I of its type."""
    inside = following > 0 and following % 2 == 0
    return not inside or tag in (following - 1, following)


def tags_of(answer: list[Entity], length: int) -> np.ndarray:
    """Tags (length,) of entities in tokens, the longest of those that overlap."""
    tags = np.zeros(length, "int32")
    for kind, start, end in sorted(answer, key=lambda entity: entity.start - entity.end):
        if not tags[start : end + 1].any():
            tags[start] = 1 + 2 * kind
            tags[start + 1 : end + 1] = 2 + 2 * kind
    return tags


def entities_of(tags: list[int]) -> list[Entity]:
    """The entities in tokens that tags say."""
    found = []
    for place, (before, tag) in enumerate(zip([0, *tags], tags, strict=False)):
        if tag % 2:
            found.append(Entity(tag // 2, place, place))
        elif tag and found and is_legal(before, tag) and found[-1].end == place - 1:
            found[-1] = found[-1]._replace(end=place)
    return found
