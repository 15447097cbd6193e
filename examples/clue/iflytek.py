"""IFLYTEK: the category of an app by its description, one of 119.

Train and dev lines are {"label": "18", "label_des": ..., "sentence": ...}, test lines have an
int "id" and no label; classes are the lines of labels.json. Descriptions have 290 characters
on average, of which the reference code reads 126. Metric: accuracy. Submission:
{"id": "0", "label": "18"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, label_codes, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"iflytek_predict.json": "test.json"}

LABEL_LINE = {"label": "18", "label_des": "电子产品"}
LINE = {"label": "18", "sentence": "手机下单，快人一步"}


def load(directory: Path) -> TaskData:
    """Read the four official files of a directory."""
    labels = label_codes(directory / "labels.json", LABEL_LINE)
    return read_task(directory, labels, LINE, lambda entry: entry["sentence"], TESTS)
