"""ChID: which of ten idioms belongs into a blank.

Lines are {"content": [passages with blanks such as #idiom000378#], "candidates": [10 idioms]},
the answers of train.json are in train_answer.json as {"#idiom000378#": 3}, the index of the
candidate, and those of dev.json in dev_answer.json. Blanks of a line have different answers.

An example is one blank: [CLS] idiom [SEP] left [unused1] right [SEP] for every candidate, with
[MASK][MASK][MASK][MASK] for other blanks of the passage. Tokens go from the outer end of the
longer side until all fit. Where the vocabulary has no [unused1], a [SEP] stands there: every
vocabulary has one, and passages have none. Metric: accuracy, of answers that differ within a
line. Submission: {"#idiom000000#": 3, ...}, one object.

Where both test files are missing, there is no submission, and `load` says so.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c3 import cut_longest
from data import Split, TaskData, read_json, read_lines
from errors import UserError
from submission import OBJECT

HEAD = "exclusive_choice"
FORMAT = OBJECT
TESTS = {"chid10_predict.json": "test1.0.json", "chid11_predict.json": "test1.1.json"}

BLANK = re.compile(r"(#idiom\d{6}#)")
OTHER_BLANK = "[MASK]" * 4
LINE = {"content": ["他们#idiom000000#，一起努力。"], "candidates": ["同心协力", "各自为政"]}


@dataclass(frozen=True)
class Blank:
    """A blank of a passage. Iterating gives its texts.

    Attributes:
        left, right: the passage around it.
        choices: the candidates.
        line: what is the same for all blanks that share the candidates.
    """

    left: str
    right: str
    choices: tuple[str, ...]
    line: int

    def __iter__(self) -> Iterator[str]:
        return iter((self.left, self.right, *self.choices))

    def rows(self, tokenizer, ids: dict[str, list[int]], max_length: int) -> list[list[int]]:
        """The token ids of every candidate; `ids` has those of all texts."""
        cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        mark = tokenizer.token_to_id("[unused1]") or sep
        idioms = [ids[choice][: max_length - 4] for choice in self.choices]
        left, right = ids[self.left], ids[self.right]
        room = max_length - 4 - max(map(len, idioms))
        keep_right, keep = cut_longest([len(right), len(left)], room)
        tail = [sep, *left[len(left) - keep :], mark, *right[:keep_right], sep]
        return [[cls, *idiom, *tail] for idiom in idioms]


def load(directory: Path) -> TaskData:
    """Read the six official files of a directory."""
    train, dev = (_labelled(directory, name) for name in ("train", "dev"))
    tests = {name: directory / file for name, file in TESTS.items()}
    if not any(path.exists() for path in tests.values()):
        print(f"{directory} has neither {' nor '.join(TESTS.values())}, so no submission")
        tests = {}
    tests = {name: _split(path) for name, path in tests.items()}
    splits = [train, dev, *tests.values()]
    most = max(len(blank.choices) for split in splits for blank in split.inputs)
    return TaskData(list(range(most)), train, dev, tests)


def is_answer(answer: Any, inputs: Blank, data: TaskData) -> bool:
    """Whether an answer of a submission is the index of a candidate."""
    return type(answer) is int and 0 <= answer < len(inputs.choices)


def _split(path: Path) -> Split:
    """All blanks of a file, with their ids."""
    blanks, ids = [], []
    for line, entry in enumerate(read_lines(path, LINE), start=1):
        choices = tuple(entry["candidates"])
        for content in entry["content"]:
            pieces = BLANK.split(content)  # text, id, text, id, ..., text
            for place in range(1, len(pieces), 2):
                left, right = pieces[:place], pieces[place + 1 :]
                left[1::2] = [OTHER_BLANK] * len(left[1::2])
                right[1::2] = [OTHER_BLANK] * len(right[1::2])
                blanks.append(Blank("".join(left), "".join(right), choices, line))
                ids.append(pieces[place])
    if not ids:
        raise UserError(f"{path} has no blank: unpack the official archive again.")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has a blank twice: unpack the official archive again.")
    return Split(blanks, ids=ids)


def _labelled(directory: Path, name: str) -> Split:
    """All blanks of a file with the indices of their idioms, from the answer file beside it."""
    path = directory / f"{name}_answer.json"
    split, answers = _split(directory / f"{name}.json"), read_json(path)
    if not isinstance(answers, dict):
        raise UserError(f"{path} holds no object: unpack the official archive again.")
    for blank, id_ in zip(split.inputs, split.ids, strict=True):
        answer, last = answers.get(id_), len(blank.choices) - 1
        if type(answer) is not int or not 0 <= answer <= last:
            got = json.dumps(answer)[:40] if id_ in answers else "none"
            raise UserError(
                f"{path}: {id_} of {name}.json, line {blank.line}, must have an answer from 0 "
                f"to {last}, got {got}: correct it or unpack the official archive again."
            )
    return Split(split.inputs, [answers[id_] for id_ in split.ids])
