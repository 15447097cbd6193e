"""Entities of texts: from characters to tokens, back, and their F1.

WordPiece makes one token of several letters or digits ("2011", "##craft"), so an entity may
begin or end inside of a token. Its tokens are all that it touches, and entities that a model
finds have all characters of their tokens: an entity that ends inside of a token cannot be found
exactly. That holds for 11 of 23,971 entities of CLUENER's train and 4 of 3,072 of dev with the
vocabulary of BERT, 17 and 1 with one made from train.

F1 is the official one: an entity is right if its type, first and last character are, and all
texts are counted together (micro average).
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from data import Rows, Split, TaskData
from settings import Settings

if TYPE_CHECKING:  # a task is read before the backend is chosen, and this imports Keras
    from keras_ext.text import Encoding, WordPieceTokenizer

# What decides which epoch is the best, of the figures that `score` gives.
METRIC = "f1"


class Entity(NamedTuple):
    """A type and a span; of characters, where nothing else is said.

    Attributes:
        type: index in the labels of the task.
        start, end: the first and the last one.
    """

    type: int
    start: int
    end: int


def align(
    tokenizer: "WordPieceTokenizer", split: Split, settings: Settings
) -> tuple[list["Encoding"], list[list[Entity]] | None]:
    """Encodings of the texts, and the answers in tokens, None for a test."""
    encodings = tokenizer.encode_batch(split.inputs, max_length=settings.max_length)
    if split.answers is None:
        return encodings, None
    pairs = zip(encodings, split.answers, strict=True)
    return encodings, [to_tokens(encoding.offsets, answer) for encoding, answer in pairs]


def to_tokens(offsets: Sequence[tuple[int, int]], entities: Iterable[Entity]) -> list[Entity]:
    """The same entities in tokens, without those that reach beyond the last token.

    Args:
        offsets: of every token the first character, and the one after the last; (0, 0) of
            special tokens.
    """
    found = set()
    for kind, start, end in entities:
        touched = [i for i, (a, b) in enumerate(offsets) if a <= end and start < b]
        if touched and end < max(b for _, b in offsets):
            found.add(Entity(kind, touched[0], touched[-1]))
    return sorted(found)


def to_characters(
    offsets: Sequence[tuple[int, int]], entities: Iterable[Entity]
) -> list[Entity]:
    """The inverse; entities with a special token at an end are left out."""
    return sorted(
        {
            Entity(kind, offsets[start][0], offsets[end][1] - 1)
            for kind, start, end in entities
            if offsets[start][1] and offsets[end][1]
        }
    )


def score(outputs: list[list[Entity]], split: Split, rows: Rows) -> dict[str, float]:
    """F1, precision and recall of the decoded outputs of a split."""
    found = given = right = 0
    for entities, offsets, answer in zip(outputs, rows.notes, split.answers, strict=True):
        predicted = set(to_characters(offsets, entities))
        found += len(predicted)
        given += len(answer)
        right += len(predicted.intersection(answer))
    return {
        "f1": 2 * right / max(found + given, 1),
        "precision": right / max(found, 1),
        "recall": right / max(given, 1),
    }


def predictions(
    outputs: list[list[Entity]], split: Split, rows: Rows, data: TaskData
) -> list[dict[str, Any]]:
    """{type: {surface: [[start, end]]}} for every row, `end` inclusive."""
    labels = []
    for entities, offsets, text in zip(outputs, rows.notes, split.inputs, strict=True):
        label = {}
        for kind, start, end in to_characters(offsets, entities):
            surfaces = label.setdefault(data.labels[kind], {})
            surfaces.setdefault(text[start : end + 1], []).append([start, end])
        labels.append(label)
    return labels
