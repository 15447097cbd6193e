"""Official CLUE files: one JSON object a line, every line checked, every fault named."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError


@dataclass(frozen=True)
class Split:
    """Examples in file order.

    Attributes:
        inputs: what is given of each example: a text, or a tuple of texts and such tuples.
        answers: what is asked for (of a classification, the index of the class), or None.
        ids: of the examples of a test, or None.
    """

    inputs: list[Any]
    answers: list[Any] | None = None
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def texts(self) -> Iterator[str]:
        """All texts, for a vocabulary."""
        return _texts(self.inputs)


@dataclass(frozen=True)
class Rows:
    """A split as the model reads it, made by the head.

    Attributes:
        token_ids: a sequence of ids a row. Where an example is several texts to choose from,
            a list of sequences. There may be several rows an example.
        targets: array of (rows, ...), or None for a test.
        notes: what the head needs to make answers of the rows again.
    """

    token_ids: list[Any]
    targets: Any = None
    notes: Any = None


@dataclass(frozen=True)
class TaskData:
    """All files of a task.

    Attributes:
        labels: the label codes as the files spell them; class i is `labels[i]`.
        train, dev: examples with answers.
        tests: name of the submission file -> examples to be predicted for it.
    """

    labels: list[str]
    train: Split
    dev: Split
    tests: dict[str, Split]

    @property
    def splits(self) -> list[Split]:
        return [self.train, self.dev, *self.tests.values()]


def read_task(
    directory: Path,
    labels: list[str],
    line: Mapping[str, Any],
    inputs: Callable[[dict[str, Any]], Any],
    tests: Mapping[str, str],
    train: str = "train.json",
    drop: tuple[str, ...] = (),
) -> TaskData:
    """The files of a task whose lines have a "label", and in tests an int "id" instead.

    Args:
        directory: of the official files; dev.json is one of them.
        labels: the codes that "label" may have.
        line: a training object, as far as it matters.
        inputs: object -> the inputs of the example; a ValueError names what is wrong.
        tests: name of the submission file -> test file.
        train: the training file.
        drop: codes of examples to leave out.
    """
    unlabelled = {"id": 0, **{key: part for key, part in line.items() if key != "label"}}
    return TaskData(
        labels=labels,
        train=_labelled(directory / train, labels, line, inputs, drop),
        dev=_labelled(directory / "dev.json", labels, line, inputs, drop),
        tests={
            name: _unlabelled(directory / file, unlabelled, inputs)
            for name, file in tests.items()
        },
    )


def is_label(answer: Any, inputs: Any, data: TaskData) -> bool:
    """Whether an answer of a submission is a label of the task."""
    return answer in data.labels


def label_codes(path: Path, example: Mapping[str, Any]) -> list[str]:
    """The codes of a labels.json, in its order."""
    labels = [entry["label"] for entry in read_lines(path, example)]
    if len(set(labels)) < len(labels):
        raise UserError(f"{path} has a label twice: keep one line each.")
    return labels


def read_lines(path: Path, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a file, each with the keys of `example` and values of the same types.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line does not fit.
    """
    lines = enumerate(read_text(path).rstrip().split("\n"), start=1)
    return [_parse(line, path, number, example) for number, line in lines]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is missing: unpack the official archive of the task into that directory, "
            "or give another one by --data."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error}): unpack the official archive again."
        ) from None
    if not text.strip():
        raise UserError(f"{path} is empty: unpack the official archive again.")
    return text


def read_json(path: Path) -> Any:
    """The content of a file that is one JSON document.

    Raises:
        UserError: as `read_text`, or the text is no JSON.
    """
    try:
        return _loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no JSON ({error}): unpack the official archive again."
        ) from None


def _labelled(path: Path, labels: list[str], line, inputs, drop: tuple[str, ...]) -> Split:
    examples, answers = [], []
    for number, entry in enumerate(read_lines(path, line), start=1):
        label = entry["label"]
        if label in drop:
            continue
        if label not in labels:
            raise UserError(
                f"{path}, line {number}: label {label!r} is none of {', '.join(labels)}: "
                "correct the line, or labels.json where the task has one."
            )
        examples.append(_inputs_of(entry, inputs, path, number))
        answers.append(labels.index(label))
    if not examples:
        raise UserError(f"{path} has no labelled example: unpack the official archive again.")
    return Split(examples, answers)


def _unlabelled(path: Path, line, inputs) -> Split:
    entries = read_lines(path, line)
    ids = [str(entry["id"]) for entry in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has an id twice: unpack the official archive again.")
    numbered = enumerate(entries, start=1)
    return Split(
        [_inputs_of(entry, inputs, path, number) for number, entry in numbered], ids=ids
    )


def _inputs_of(entry: dict[str, Any], inputs, path: Path, number: int) -> Any:
    try:
        return inputs(entry)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def _texts(inputs: Any) -> Iterator[str]:
    if isinstance(inputs, str):
        yield inputs
    else:
        for part in inputs:
            yield from _texts(part)


def _parse(line: str, path: Path, number: int, example: Mapping[str, Any]) -> dict[str, Any]:
    try:
        entry = _loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not fits(entry, example):
        raise UserError(
            f"{path}, line {number}: expected an object such as "
            f"{json.dumps(example, ensure_ascii=False)}, got {line.strip()[:80]!r}: "
            "correct the line or unpack the official archive again."
        )
    return entry


def _loads(text: str) -> Any:
    value = json.loads(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return value


def fits(value: Any, example: Any) -> bool:
    """Whether a value has the types of an example, and at least its keys.

    A list fits if it has entries and all of them fit the first one of the example.
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], part) for key, part in example.items()
        )
    if isinstance(example, list):
        return (
            isinstance(value, list) and bool(value) and all(fits(v, example[0]) for v in value)
        )
    return type(value) is type(example)
