"""TNEWS: the category of a short news title, one of 15.

Train and dev lines are {"label": "102", "label_desc": "news_entertainment", "sentence": ...,
"keywords": ...}, test lines have an int "id" and no label. The codes are not contiguous (105
and 111 do not exist), so classes are the lines of labels.json. Keywords are not used, as in
the reference code. Metric: accuracy. Submission: {"id": "0", "label": "102"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, label_codes, read_task
from submission import LINES

# The module that builds the head and scores it, the format of submissions, what they may say.
HEAD = "classification"
FORMAT, is_answer = LINES, is_label

# Submission file -> test file: version 1.0 and 1.1 of the leaderboard.
TESTS = {"tnews10_predict.json": "test1.0.json", "tnews11_predict.json": "test.json"}

LABEL_LINE = {"label": "102", "label_desc": "news_entertainment"}
LINE = {"label": "102", "sentence": "江疏影甜甜圈自拍"}


def load(directory: Path) -> TaskData:
    """Read the five official files of a directory."""
    labels = label_codes(directory / "labels.json", LABEL_LINE)
    return read_task(directory, labels, LINE, lambda entry: entry["sentence"], TESTS)
