"""CLUEWSC2020: whether a pronoun means a given noun.

Train and dev lines are {"target": {"span1_index": 3, "span1_text": "伤口", "span2_index": 27,
"span2_text": "它们"}, "idx": 258, "label": "false", "text": ...}, test lines have "id" instead
of "idx" and no label; indices count characters. Both spans are marked in the text, the noun as
_伤口_ and the pronoun as [它们], as in the reference code: without marks (or with others)
published scores are 20 points lower. 63.5 % of dev are "true", and an example of dev is 0.33
points. Metric: accuracy. Submission: {"id": "0", "label": "true"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"cluewsc10_predict.json": "test1.0.json", "cluewsc11_predict.json": "test.json"}

LABELS = ["false", "true"]
TARGET = {"span1_index": 0, "span1_text": "小明", "span2_index": 4, "span2_text": "他"}
LINE = {"label": "true", "target": TARGET, "text": "小明说，他来"}


def load(directory: Path) -> TaskData:
    """Read the four official files of a directory."""
    return read_task(directory, LABELS, LINE, marked, TESTS)


def marked(entry: dict) -> str:
    """The text with both spans marked."""
    text, target = entry["text"], entry["target"]
    spans = []
    for number, marks in ((1, "__"), (2, "[]")):
        start, span = target[f"span{number}_index"], target[f"span{number}_text"]
        if start < 0 or not span or text[start : start + len(span)] != span:
            raise ValueError(
                f"span{number}_text {span!r} is not at character {start} of the text: correct "
                "the line or unpack the official archive again."
            )
        spans.append((start, start + len(span), marks))
    for start, end, (before, after) in sorted(spans, reverse=True):  # the later one first
        text = f"{text[:start]}{before}{text[start:end]}{after}{text[end:]}"
    return text
