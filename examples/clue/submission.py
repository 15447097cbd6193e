"""Submission files: how answers are written, and how they are read to be checked."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from data import Split


class Format(NamedTuple):
    """A file format.

    Attributes:
        write: (a test, an answer for each of its examples) -> the text of the file.
        read: the text of a file -> its (id, answer) pairs; anything else is a ValueError.
    """

    write: Callable[[Split, list[Any]], str]
    read: Callable[[str], list[tuple[str, Any]]]


def _write_lines(split: Split, answers: list[Any]) -> str:
    pairs = zip(split.ids, answers, strict=True)
    return "".join(json.dumps({"id": id_, "label": answer}) + "\n" for id_, answer in pairs)


def _read_lines(text: str) -> list[tuple[str, Any]]:
    entries = [json.loads(line) for line in text.splitlines()]
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or entry.keys() != {"id", "label"}:
            raise ValueError(f'line {number}: expected {{"id": ..., "label": ...}}')
    return [(entry["id"], entry["label"]) for entry in entries]


def _write_object(split: Split, answers: list[Any]) -> str:
    pairs = zip(split.ids, answers, strict=True)
    return json.dumps(dict(pairs), ensure_ascii=False, indent=4) + "\n"


def _read_object(text: str) -> list[tuple[str, Any]]:
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise ValueError("expected one object")
    return list(entry.items())


# {"id": "0", "label": "102"} a line: ids as strings, labels as the task spells them.
LINES = Format(_write_lines, _read_lines)

# {"id": answer, ...}, one object.
OBJECT = Format(_write_object, _read_object)
