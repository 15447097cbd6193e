"""Official CLUE files: one JSON object a line, every line checked, every fault named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError


@dataclass(frozen=True)
class Split:
    """Examples in file order; `classes` are indices into the label codes, `ids` of tests."""

    texts: list[str]
    classes: list[int] | None = None
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """All files of a task.

    Attributes:
        labels: the label codes as the files spell them; class i is `labels[i]`.
        train, dev: labelled examples.
        tests: name of the submission file -> examples to be predicted for it.
    """

    labels: list[str]
    train: Split
    dev: Split
    tests: dict[str, Split]

    @property
    def splits(self) -> list[Split]:
        return [self.train, self.dev, *self.tests.values()]


def read_lines(path: Path, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a file, each with the keys of `example` and values of the same types.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line does not fit.
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
    lines = enumerate(text.rstrip().split("\n"), start=1)
    return [_parse(line, path, number, example) for number, line in lines]


def label_indices(
    objects: list[dict[str, Any]], labels: list[str], path: Path, source: Path
) -> list[int]:
    """The class of every object by its "label", or an error that names the line."""
    index = {label: number for number, label in enumerate(labels)}
    for number, entry in enumerate(objects, start=1):
        if entry["label"] not in index:
            raise UserError(
                f"{path}, line {number}: label {entry['label']!r} is not in {source}, which "
                f"has {', '.join(labels)}: correct the line or {source.name}."
            )
    return [index[entry["label"]] for entry in objects]


def _parse(line: str, path: Path, number: int, example: Mapping[str, Any]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        entry = None
    fits = isinstance(entry, dict) and all(
        isinstance(entry.get(key), type(value)) for key, value in example.items()
    )
    if not fits:
        raise UserError(
            f"{path}, line {number}: expected an object such as "
            f"{json.dumps(example, ensure_ascii=False)}, got {line.strip()[:80]!r}: "
            "correct the line or unpack the official archive again."
        )
    return entry
