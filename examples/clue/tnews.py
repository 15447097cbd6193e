"""TNEWS: the category of a short news title, one of 15.

Train and dev lines are {"label": "102", "label_desc": "news_entertainment", "sentence": ...,
"keywords": ...}, test lines have an int "id" and no label. The codes are not contiguous (105
and 111 do not exist), so classes are the lines of labels.json. Keywords are not used, as in
the reference code. Metric: accuracy. Submission: {"id": "0", "label": "102"} a line.
"""

import json
from pathlib import Path

from data import Split, TaskData, label_indices, read_lines
from errors import UserError

# The module that builds the head and scores it.
HEAD = "classification"

# Submission file -> test file: version 1.0 and 1.1 of the leaderboard.
TESTS = {"tnews10_predict.json": "test1.0.json", "tnews11_predict.json": "test.json"}

LABEL_LINE = {"label": "102", "label_desc": "news_entertainment"}
LABELLED_LINE = {"label": "102", "sentence": "江疏影甜甜圈自拍"}
TEST_LINE = {"id": 0, "sentence": "江疏影甜甜圈自拍"}


def load(directory: Path) -> TaskData:
    """Read the five official files of a directory."""
    labels = [entry["label"] for entry in read_lines(directory / "labels.json", LABEL_LINE)]
    if len(set(labels)) < len(labels):
        raise UserError(f"{directory / 'labels.json'} has a label twice: keep one line each.")
    return TaskData(
        labels=labels,
        train=_read_labelled(directory / "train.json", labels),
        dev=_read_labelled(directory / "dev.json", labels),
        tests={name: _read_test(directory / file) for name, file in TESTS.items()},
    )


def submission_line(example_id: str, label: str) -> str:
    """One line of a submission file, with the id as a string and the original code."""
    return json.dumps({"id": example_id, "label": label})


def _read_labelled(path: Path, labels: list[str]) -> Split:
    entries = read_lines(path, LABELLED_LINE)
    classes = label_indices(entries, labels, path, path.with_name("labels.json"))
    return Split([entry["sentence"] for entry in entries], classes=classes)


def _read_test(path: Path) -> Split:
    entries = read_lines(path, TEST_LINE)
    texts = [entry["sentence"] for entry in entries]
    return Split(texts, ids=[str(entry["id"]) for entry in entries])
