"""AFQMC: whether two questions to a bank's customer service mean the same.

Train and dev lines are {"sentence1": ..., "sentence2": ..., "label": "0"}, test lines have an
int "id" and no label. 69.0 % of dev are "0". Metric: accuracy. Submission:
{"id": "0", "label": "1"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"afqmc_predict.json": "test.json"}

LABELS = ["0", "1"]
LINE = {"label": "0", "sentence1": "花呗怎么还款", "sentence2": "花呗何时还款"}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    return read_task(directory, LABELS, LINE, pair, TESTS)


def pair(entry: dict) -> tuple[str, str]:
    """The two sentences; segment ids are 0 for both, as in the reference code."""
    return entry["sentence1"], entry["sentence2"]
