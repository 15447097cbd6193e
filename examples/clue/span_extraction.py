"""The answer to a question as a span of a text: windows, one softmax over all spans of each.

A row is [CLS] question [SEP] window [SEP]. A text too long for one row has several windows,
each `stride` tokens after the one before, and all of its tokens are in one of them. A span is
scored as a whole, by its first and its last token (`GlobalPointer`), and the scores of a row
are one classification over all length² spans:

    loss = log Σ exp s(i, j) - s(first, last)

where (0, 0), [CLS] to itself, is true for a window without the answer. The prediction is the
span of the highest score among all windows of the question, without [CLS].

Train, where the answer is known, leaves out the windows that hold a part of it only; all other
splits are cut up without looking at the answers. Spans are those of tokens: the offsets that
the tokenizer gives lead back to the characters of the text.

Memory: length² · batch scores, 17 MB in float32 for 16 rows of 512, a few times over while
training. `decode` reduces them batch by batch.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
from data import Rows, Split, TaskData
from errors import UserError
from keras import ops
from mean_loss import MeanLoss
from metrics import exact_match, f1_score
from settings import Settings

from keras_ext.layers.global_pointer import MASKED, GlobalPointer
from keras_ext.text import WordPieceTokenizer

# What decides which epoch is the best, of the figures that `score` gives.
METRIC = "em"

# Settings of classifiers, which mean nothing here.
UNUSED = ("pooling", "label_smoothing")

Span = tuple[int, int]  # the first and the last token, both inclusive


class Window(NamedTuple):
    """Where the window of a row comes from.

    Attributes:
        example: the index of the question in its split.
        offsets: the characters of every token of the whole text.
        shift: what a token's place in the row exceeds that in the text by.
    """

    example: int
    offsets: list[tuple[int, int]]
    shift: int

    def text(self, span: Span, context: str) -> str:
        """The characters of a span of the row."""
        first, last = span
        return context[self.offsets[first - self.shift][0] : self.offsets[last - self.shift][1]]


def encode(
    tokenizer: WordPieceTokenizer, split: Split, data: TaskData, settings: Settings
) -> Rows:
    """Rows of all windows; of train with the answers' spans (rows, 2), without cut answers."""
    check(settings)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    questions = _tokens(tokenizer, (question for question, _ in split.inputs))
    contexts = _tokens(tokenizer, (context for _, context in split.inputs))
    train = split is data.train
    rows = []
    for example, (question, context) in enumerate(split.inputs):
        # Half of the room at most: there must be a window beside any question.
        head = [cls, *questions[question][0][: (settings.max_length - 3) // 2], sep]
        ids, offsets = contexts[context]
        answer = answer_span(split.answers[example], offsets) if train else None
        size = settings.max_length - len(head) - 1
        for start, end in windows(len(ids), size, settings.stride):
            shift = len(head) - start
            target = None if answer is None else target_span(answer, start, end, shift)
            if target is not None or not train:
                window = Window(example, offsets, shift)
                rows.append(([*head, *ids[start:end], sep], target, window))
    if not rows:
        raise UserError("no answer of train fits into a window: give a larger --max-length")
    token_ids, targets, notes = map(list, zip(*rows, strict=True))
    return Rows(token_ids, np.array(targets, "int32") if train else None, notes)


def check(settings: Settings) -> None:
    """Refuse settings that cannot be, or would have no effect."""
    if settings.max_length < 5:
        raise UserError(f"max_length must be at least 5 for spans, got {settings.max_length}")
    for name in UNUSED:
        if getattr(settings, name) != getattr(Settings(), name):
            flag = name.replace("_", "-")
            raise UserError(f"{name} has no meaning for spans: leave out --{flag}")


def windows(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends of the windows of a text, `stride` or, if that is less, `size` apart."""
    step = min(stride, size)
    count = 1 + -(-max(length - size, 0) // step)
    return [(i * step, min(i * step + size, length)) for i in range(count)]


def answer_span(
    answers: Iterable[tuple[str, int | None]], offsets: list[tuple[int, int]]
) -> Span | None:
    """The tokens of the first answer that the text has, also those that it has a part of."""
    for text, start in answers:
        if start is not None:
            end = start + len(text)
            tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            if tokens:
                return tokens[0], tokens[-1]
    return None


def target_span(answer: Span, start: int, end: int, shift: int) -> Span | None:
    """The place of the answer in a row, (0, 0) if it is not there, None if it is cut."""
    first, last = answer
    if start <= first and last < end:
        return first + shift, last + shift
    return (0, 0) if last < start or first >= end else None


def build_model(
    encoder: keras.Model, data: TaskData, settings: Settings
) -> tuple[list, keras.KerasTensor]:
    """Inputs and scores (batch, length, length) of all spans, of the first and last token."""
    hidden = keras.layers.Dropout(settings.head_dropout, name="head_dropout")(encoder.output)
    pointer = GlobalPointer(heads=1, use_bias=False, dtype="float32", name="pointer")
    scores = pointer(hidden, mask=span_mask(encoder.inputs[0]))
    return encoder.inputs, ops.squeeze(scores, axis=1)


def span_mask(token_ids: Any) -> Any:
    """True for [CLS] and for the window, False for the question, [SEP] and padding.

    Rows are [CLS] question [SEP] window [SEP] and zeros, without these ids elsewhere, so the
    first token is [CLS] and the last one [SEP].
    """
    size = ops.sum(ops.cast(ops.not_equal(token_ids, 0), "int32"), axis=1, keepdims=True)
    is_sep = ops.equal(token_ids, ops.take_along_axis(token_ids, size - 1, axis=1))
    after_first = ops.equal(ops.cumsum(ops.cast(is_sep, "int32"), axis=1), 1)
    window = ops.logical_and(after_first, ops.logical_not(is_sep))
    return ops.logical_or(window, ops.equal(token_ids, token_ids[:, :1]))


class SpanCrossentropy(keras.losses.Loss):
    """Softmax cross-entropy over all spans of a row.

    Call arguments: spans (batch, 2), scores (batch, length, length); losses (batch,).
    """

    def call(self, y_true: Any, y_pred: Any) -> Any:
        spans, length = ops.cast(y_true, "int32"), ops.shape(y_pred)[2]
        scores = ops.reshape(y_pred, (-1, length * length))
        number = spans[:, :1] * length + spans[:, 1:]  # (batch, 1)
        true = ops.take_along_axis(scores, number, axis=1)
        return ops.logsumexp(scores, axis=1) - ops.squeeze(true, axis=1)


def compile_arguments(settings: Settings) -> dict:
    """Loss and metric over real rows only: padded ones have sample weight zero."""
    loss = SpanCrossentropy(reduction="mean_with_sample_weight")
    return {"loss": loss, "weighted_metrics": [MeanLoss(loss, name="crossentropy")]}


def decode(scores: np.ndarray) -> list[tuple[float, Span]]:
    """The highest score of every row of a batch and its span, [CLS] left out."""
    rows, length, _ = scores.shape
    scores = scores[:, 1:, 1:].reshape(rows, -1)
    places = scores.argmax(axis=1)
    highest = scores[np.arange(rows), places].tolist()
    firsts, lasts = (number.tolist() for number in np.divmod(places, length - 1))
    return [
        (score, (first + 1, last + 1))
        for score, first, last in zip(highest, firsts, lasts, strict=True)
    ]


def answers(outputs: list[tuple[float, Span]], split: Split, rows: Rows) -> list[str]:
    """The answer to every question, from that of its windows with the highest score."""
    texts, highest = [""] * len(split), [MASKED] * len(split)  # as of windows without tokens
    for (score, span), window in zip(outputs, rows.notes, strict=True):
        if score > highest[window.example]:
            highest[window.example] = score
            texts[window.example] = window.text(span, split.inputs[window.example][1])
    return texts


def score(outputs: list[tuple[float, Span]], split: Split, rows: Rows) -> dict[str, float]:
    """Official exact match and F1, means over the questions of a split."""
    pairs = [
        (text, [answer for answer, _ in known])
        for text, known in zip(answers(outputs, split, rows), split.answers, strict=True)
    ]
    return {
        "em": float(np.mean([exact_match(*pair) for pair in pairs])),
        "f1": float(np.mean([f1_score(*pair) for pair in pairs])),
    }


def predictions(
    outputs: list[tuple[float, Span]], split: Split, rows: Rows, data: TaskData
) -> list[str]:
    """The text of every answer."""
    return answers(outputs, split, rows)


def _tokens(
    tokenizer: WordPieceTokenizer, texts: Iterable[str]
) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of every text, without special tokens, those spelled out included."""
    texts = list(dict.fromkeys(texts))
    unknown = tokenizer.token_to_id("[UNK]")
    special = {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")}
    return {
        text: (
            [unknown if id_ in special else id_ for id_ in encoding.token_ids[1:-1]],
            encoding.offsets[1:-1],
        )
        for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True)
    }
