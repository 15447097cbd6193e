"""CLUENER: the named entities of a sentence, of ten types.

Train and dev lines are {"text": ..., "label": {"name": {"叶老桂": [[9, 11]]}}}: by type and by
surface, the first and the last character of each occurrence, counted from 0. Test lines have
an int "id" and no label. Texts have 37 characters on average and 50 at most. In one line of
train two entities lie within a third; no others overlap. Metric: F1 of (type, start, end) over
all sentences. Submission: the test line and its label,
{"id": 0, "text": ..., "label": {"address": {"四川": [[0, 1]]}}} a line.
"""

import json
from pathlib import Path
from typing import Any

from data import Split, TaskData, fits, read_lines
from entities import Entity
from errors import UserError
from submission import Format

HEAD = "entities_{head}"  # by the flag --head

LABELS = ["address", "book", "company", "game", "government", "movie", "name", "organization",
          "position", "scene"]  # fmt: skip
LINE = {"text": "叶老桂认为", "label": {}}
TEST_LINE = {"id": 0, "text": "叶老桂认为"}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    tests = {"cluener_predict.json": _unlabelled(directory / "test.json")}
    train, dev = (_labelled(directory / name) for name in ("train.json", "dev.json"))
    return TaskData(LABELS, train, dev, tests)


def entities_of(label: dict[str, Any], text: str) -> list[Entity]:
    """The entities of a label object, sorted; a ValueError says what does not fit the text."""
    found = set()
    for kind, surfaces in label.items():
        if kind not in LABELS:
            raise ValueError(f"type {kind[:20]!r} is none of {', '.join(LABELS)}")
        if not fits(surfaces, {}) or not all(map(_are_spans, surfaces.values())):
            raise ValueError(f'{kind} must be an object such as {{"叶老桂": [[9, 11]]}}')
        for surface, spans in surfaces.items():
            for start, end in spans:
                if not 0 <= start <= end < len(text) or text[start : end + 1] != surface:
                    place = f"characters {start} to {end}"
                    raise ValueError(f"the {place} of the text are not {surface[:20]!r}")
                found.add(Entity(LABELS.index(kind), start, end))
    return sorted(found)


def _are_spans(spans: Any) -> bool:
    return fits(spans, [[0]]) and all(len(span) == 2 for span in spans)


def is_answer(answer: Any, text: str, data: TaskData) -> bool:
    """Whether a label object fits a text."""
    try:
        entities_of(answer, text)
    except ValueError:
        return False
    return True


def _labelled(path: Path) -> Split:
    entries, answers = read_lines(path, LINE), []
    for number, entry in enumerate(entries, start=1):
        try:
            answers.append(entities_of(entry["label"], entry["text"]))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {error}: correct the line or unpack the official "
                "archive again."
            ) from None
    return Split([entry["text"] for entry in entries], answers)


def _unlabelled(path: Path) -> Split:
    entries = read_lines(path, TEST_LINE)
    ids = [str(entry["id"]) for entry in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has an id twice: unpack the official archive again.")
    return Split([entry["text"] for entry in entries], ids=ids)


def _write(split: Split, labels: list[dict[str, Any]]) -> str:
    entries = zip(split.ids, split.inputs, labels, strict=True)
    lines = ({"id": int(id_), "text": text, "label": label} for id_, text, label in entries)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read(content: str) -> list[tuple[str, dict[str, Any]]]:
    # Not splitlines: a text may hold U+2028.
    entries = [json.loads(line) for line in content.rstrip("\n").split("\n")]
    for number, entry in enumerate(entries, start=1):
        if not fits(entry, {**TEST_LINE, "label": {}}) or len(entry) != 3:
            raise ValueError(f"line {number}: expected an id, a text and a label object")
    return [(str(entry["id"]), entry["label"]) for entry in entries]


FORMAT = Format(_write, _read)
