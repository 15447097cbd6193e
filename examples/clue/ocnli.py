"""OCNLI: natural language inference on sentences written in Chinese.

As CMNLI, with five annotators' labels, genre and more in every line, which are not used. "-"
is left out (49 of train, 50 of dev). The training file is the one of 50,000 examples. Metric:
accuracy. Submission: {"id": "0", "label": "neutral"} a line.
"""

from pathlib import Path

from afqmc import pair
from cmnli import LABELS, LINE
from data import TaskData, is_label, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"ocnli_50k_predict.json": "test.json"}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    train = "train.50k.json"
    return read_task(directory, LABELS, LINE, pair, TESTS, train=train, drop=("-",))
