"""CMNLI: whether a sentence follows from another, contradicts it, or neither.

MNLI and XNLI in machine translation. Train and dev lines are {"sentence1": ..., "sentence2":
..., "label": "neutral"}; those with the label "-", on which annotators did not agree, are left
out (185 of dev). Test lines have an int "id" and no label. Metric: accuracy. Submission:
{"id": "0", "label": "neutral"} a line.
"""

from pathlib import Path

from afqmc import pair
from data import TaskData, is_label, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"cmnli_predict.json": "test.json"}

LABELS = ["entailment", "neutral", "contradiction"]
LINE = {"label": "neutral", "sentence1": "天在下雨", "sentence2": "路很滑"}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    return read_task(directory, LABELS, LINE, pair, TESTS, drop=("-",))
