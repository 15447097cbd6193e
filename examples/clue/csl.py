"""CSL: whether all of some keywords are those of a paper, by its abstract.

Lines are {"id": 1, "abst": ..., "keyword": [2 to 4 strings], "label": "1"}, in tests without
the label. The keywords, joined by ；, are the first text and the abstract is the second.
Abstracts have 280 characters on average. Metric: accuracy, half of dev is "1". Submission:
{"id": "0", "label": "1"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, read_task
from submission import LINES

HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"csl_predict.json": "test.json"}

LABELS = ["0", "1"]
LINE = {"label": "1", "keyword": ["深度学习", "翻译"], "abst": "提出一种翻译方法"}


def load(directory: Path) -> TaskData:
    """Read the three official files of a directory."""
    return read_task(directory, LABELS, LINE, keywords_and_abstract, TESTS)


def keywords_and_abstract(entry: dict) -> tuple[str, str]:
    return "；".join(entry["keyword"]), entry["abst"]
