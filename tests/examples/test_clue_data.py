import json

import data
import pytest
import tnews
from clue_files import LABELS, write_lines
from data import Split
from errors import UserError
from run import SAMPLE
from submission import LINES


def test_sample_is_complete():
    sample = tnews.load(SAMPLE / "tnews")
    assert len(sample.labels) == len(set(sample.labels)) == 15
    assert set(sample.train.answers) == set(range(15))
    assert list(sample.tests) == ["tnews10_predict.json", "tnews11_predict.json"]


def test_classes_are_the_lines_of_labels_json(tiny_tnews):
    loaded = tnews.load(tiny_tnews)
    assert loaded.labels == LABELS
    with (tiny_tnews / "train.json").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [loaded.labels[index] for index in loaded.train.answers] == [
        x["label"] for x in lines
    ]
    assert loaded.train.inputs == [x["sentence"] for x in lines]
    assert loaded.tests["tnews11_predict.json"].ids == [str(i) for i in range(10, -1, -1)]
    assert loaded.tests["tnews10_predict.json"].ids == [str(i) for i in range(110, 99, -1)]


def test_submission_line_has_strings_as_the_reference_code_writes_them():
    text = LINES.write(Split(["花"], ids=["0"]), ["102"])
    assert text == '{"id": "0", "label": "102"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.json is missing: unpack"),
        ("", "train.json is empty: unpack"),
        ("\n\n", "train.json is empty"),
        ('{"label": "100", "sentence": "花"}\n{"la', 'train.json, line 2: expected .*"102"'),
        ('{"label": "100", "sentence": "花"}\n\n{}', "train.json, line 2: expected"),
        ('{"label": 100, "sentence": "花"}', "train.json, line 1: expected"),
        ('["100"]', "train.json, line 1: expected"),
        ('{"label": "100", "sentence": "花"}\n{"label": "101", "sentence": "花"}',
         "train.json, line 2: label '101' is none of 100, 104, 116"),
        (b"\xff\xfe", "train.json is not UTF-8"),
    ],
)  # fmt: skip
def test_bad_train_files(tmp_path, content, message):
    write_lines(tmp_path / "labels.json", [{"label": x, "label_desc": "news"} for x in LABELS])
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        tnews.load(tmp_path)


def test_labels_must_be_there_and_unique(tmp_path):
    with pytest.raises(UserError, match=r"labels\.json is missing"):
        tnews.load(tmp_path)
    write_lines(tmp_path / "labels.json", [{"label": "100", "label_desc": "news"}] * 2)
    with pytest.raises(UserError, match="has a label twice"):
        tnews.load(tmp_path)


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "dev.json"
    path.write_bytes('\ufeff{"sentence": "花"}\r\n{"sentence": "草"}\r\n'.encode())
    assert [entry["sentence"] for entry in data.read_lines(path, {"sentence": ""})] == [
        "花",
        "草",
    ]


@pytest.mark.real_data
def test_counts_of_the_official_files(shared):
    official = tnews.load(shared / "clue" / "tnews")
    assert len(official.labels) == 15
    assert [len(split) for split in official.splits] == [53360, 10000, 10000, 10000]
