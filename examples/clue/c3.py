"""C3: questions on a dialogue (d) or another text (m), each with 2 to 4 choices.

Files are lists of [[sentences of the passage], [{"question": ..., "choice": [...], "answer":
the text of a choice}], "id"]; in tests questions have an int "id" and no answer, and the last
part is absent. Six questions of version 1.1 have up to 10 choices. A row is [CLS] passage [SEP]
question [SEP] choice [SEP]; one that is too long is cut at the end of its longest part. Metric:
accuracy. Submission: {"id": "0", "label": "2"} a line, the label counting choices from zero.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data import Split, TaskData, fits, read_json
from errors import UserError
from submission import LINES

HEAD = "multiple_choice"
FORMAT = LINES
TESTS = {"c310_predict.json": "test1.0.json", "c311_predict.json": "test1.1.json"}

QUESTION = {"question": "他去哪儿？", "choice": ["学校", "公园"]}


class Question(NamedTuple):
    passage: str
    question: str
    choices: tuple[str, ...]

    def rows(self, tokenizer, ids: dict[str, list[int]], max_length: int) -> list[list[int]]:
        """The token ids of every choice; `ids` has those of the three kinds of texts."""
        cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        passage, question = [cls, *ids[self.passage]], ids[self.question]
        rows = []
        for choice in self.choices:
            parts = (ids[choice], question, passage)
            kept = cut_longest([len(part) + 1 for part in parts], max_length)
            cut = [[*part[: size - 1], sep] for part, size in zip(parts, kept, strict=True)]
            rows.append([*chain(*reversed(cut))])
        return rows


def cut_longest(sizes: list[int], room: int) -> list[int]:
    """The sizes after taking one from the largest, the first of equals, until all fit."""
    sizes = list(sizes)
    while (excess := sum(sizes) - room) > 0:
        *_, second, largest = sorted(sizes)
        sizes[sizes.index(largest)] -= min(excess, max(largest - second, 1))
    return sizes


def load(directory: Path) -> TaskData:
    """Read the six official files of a directory."""
    train, dev = (
        _join(_read(directory / f"{kind}-{part}.json", "answer", "学校") for kind in "md")
        for part in ("train", "dev")
    )
    tests = {name: _test(directory / file) for name, file in TESTS.items()}
    most = max(len(x.choices) for split in (train, dev, *tests.values()) for x in split.inputs)
    return TaskData([str(index) for index in range(most)], train, dev, tests)


def _join(parts) -> Split:
    return Split(*([*chain(*lists)] for lists in zip(*parts, strict=True)))


def _test(path: Path) -> Split:
    inputs, ids = _read(path, "id", 0)
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has an id twice: unpack the official archive again.")
    return Split(inputs, ids=list(map(str, ids)))


def is_answer(answer: Any, inputs: Question, data: TaskData) -> bool:
    """Whether an answer of a submission is the number of a choice."""
    return answer in map(str, range(len(inputs.choices)))


def _read(path: Path, key: str, value: Any) -> tuple[list[Question], list[int]]:
    """The questions of a file, and the index of the answer or the id of each."""
    example = [["小明去上学了。"], [{**QUESTION, key: value}]]
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of passages: unpack the official archive again.")
    questions, values = [], []
    for number, entry in enumerate(entries, start=1):
        if not (isinstance(entry, list) and all(map(fits, entry, example)) and entry[1:]):
            raise UserError(
                f"{path}, passage {number}: expected a list such as "
                f"{json.dumps(example, ensure_ascii=False)}, got {str(entry)[:80]!r}: "
                "correct the passage or unpack the official archive again."
            )
        passage = "||".join(entry[0])
        for part in entry[1]:
            choices = tuple(part["choice"])
            if key == "answer" and part[key] not in choices:
                raise UserError(
                    f"{path}, passage {number}: the answer {part[key][:40]!r} is none of "
                    f"{', '.join(map(repr, choices))}: correct one of them."
                )
            questions.append(Question(passage, part["question"], choices))
            values.append(choices.index(part[key]) if key == "answer" else part[key])
    return questions, values
