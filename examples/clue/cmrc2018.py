"""CMRC2018: the answer to a question, as a span of a paragraph.

One object a file, as in SQuAD: {"data": [{"paragraphs": [{"context": ..., "qas": [{"id":
"TRAIN_186_QUERY_0", "question": ..., "answers": [{"text": ..., "answer_start": 30}]}]}]}]},
where answer_start counts characters. Dev has three answers a question; those of the test are
placeholders. Paragraphs have 510 characters on average, at most 980. Metrics: exact match (the
figure of the leaderboard, which decides the best epoch) and F1. Submission: {id: text, ...}.

21 of the 10,142 answers of train and 200 of the 9,657 of dev do not stand at answer_start. They
are looked for from the front: all of train are found, and 7 of dev. The others (of dev, where
annotators wrote another word than the text has) count for scores, and could not for training.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import Split, TaskData, fits, read_json
from errors import UserError
from submission import OBJECT

HEAD = "span_extraction"
FORMAT = OBJECT
TESTS = {"cmrc2018_predict.json": "test.json"}

PARAGRAPH = {"context": "小明住在北京。", "qas": [{}]}
QUESTION = {"id": "TEST_0_QUERY_0", "question": "小明住在哪里？"}
ANSWERED = {**QUESTION, "answers": [{"text": "北京", "answer_start": 4}]}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    return TaskData(
        labels=[],
        train=read(directory / "train.json"),
        dev=read(directory / "dev.json"),
        tests={name: read(directory / file, test=True) for name, file in TESTS.items()},
    )


def is_answer(answer: Any, inputs: tuple[str, str], data: TaskData) -> bool:
    """Whether an answer of a submission is a part of the paragraph."""
    return isinstance(answer, str) and answer in inputs[1]


def read(path: Path, test: bool = False) -> Split:
    """The questions of a file.

    Inputs are (question, paragraph). Answers are a list of (text, start) a question, the start
    None where the text is not in the paragraph; a test has ids instead.

    Raises:
        UserError: the file is missing, or is not as described.
    """
    pairs = list(_questions(path, QUESTION if test else ANSWERED))
    inputs = [(question["question"], context) for question, context in pairs]
    if not test:
        return Split(
            inputs, [[_locate(a, context) for a in q["answers"]] for q, context in pairs]
        )
    ids = [question["id"] for question, _ in pairs]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has an id twice: unpack the official archive again.")
    return Split(inputs, ids=ids)


def _locate(answer: dict[str, Any], context: str) -> tuple[str, int | None]:
    text, start = answer["text"], answer["answer_start"]
    if start < 0 or not context.startswith(text, start):
        start = context.find(text)
    return text, start if start >= 0 and text.strip() else None


def _questions(path: Path, example: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every question with its paragraph."""
    document = read_json(path)
    _check(document, {"data": [{}]}, f"{path}")
    for i, entry in enumerate(document["data"], start=1):
        place = f"{path}, data entry {i}"
        _check(entry, {"paragraphs": [PARAGRAPH]}, place)
        for j, paragraph in enumerate(entry["paragraphs"], start=1):
            for k, question in enumerate(paragraph["qas"], start=1):
                _check(question, example, f"{place}, paragraph {j}, question {k}")
                yield question, paragraph["context"]


def _check(value: Any, example: dict[str, Any], place: str) -> None:
    if not fits(value, example):
        raise UserError(
            f"{place}: expected an object such as {json.dumps(example, ensure_ascii=False)}, "
            f"got {json.dumps(value, ensure_ascii=False)[:80]}: correct it or unpack the "
            "official archive again."
        )
