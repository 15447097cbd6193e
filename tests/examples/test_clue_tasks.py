"""The tasks whose examples are single texts or pairs: what their files mean, and bad files."""

import importlib

import pytest
from clue_files import check_damage, write_lines
from errors import UserError
from submit import check

TARGET = {"span1_index": 0, "span1_text": "小明", "span2_index": 5, "span2_text": "他"}
WSC = {"target": TARGET, "text": "小明笑了，他来", "idx": 3}
PAIR = {"sentence1": "天在下雨", "sentence2": "路很滑"}

# Task -> (a line without label or id, its inputs, labels, training file)
TASKS = {
    "tnews": ({"sentence": "花开", "keywords": ""}, "花开", ["100", "104"], "train.json"),
    "iflytek": ({"sentence": "打车", "label_des": ""}, "打车", ["0", "18"], "train.json"),
    "afqmc": (PAIR, tuple(PAIR.values()), ["0", "1"], "train.json"),
    "cmnli": (PAIR, tuple(PAIR.values()), ["neutral", "-"], "train.json"),
    "ocnli": (
        {**PAIR, "genre": "tv"},
        tuple(PAIR.values()),
        ["-", "neutral"],
        "train.50k.json",
    ),
    "cluewsc2020": (WSC, "_小明_笑了，[他]来", ["false", "true"], "train.json"),
    "csl": (
        {"keyword": ["甲", "乙"], "abst": "丙"},
        ("甲；乙", "丙"),
        ["0", "1"],
        "train.json",
    ),
}


def write_task(name, directory):
    """The official files of a task with two examples each."""
    line, _, labels, train = TASKS[name]
    task = importlib.import_module(name)
    for file in (train, "dev.json"):
        write_lines(directory / file, [{**line, "label": label} for label in labels])
    if hasattr(task, "LABEL_LINE"):
        codes = [{**task.LABEL_LINE, "label": label} for label in labels]
        write_lines(directory / "labels.json", codes)
    for file in task.TESTS.values():
        write_lines(directory / file, [{**line, "id": 7}, {**line, "id": 2}])
    return task


@pytest.mark.parametrize("name", list(TASKS))
def test_examples_are_read(tmp_path, name):
    task = write_task(name, tmp_path)
    data = task.load(tmp_path)
    _, inputs, labels, _ = TASKS[name]
    kept = [label for label in labels if label != "-"]
    for split in (data.train, data.dev):
        assert split.inputs == [inputs] * len(kept)
        assert [data.labels[index] for index in split.answers] == kept
    assert list(data.tests) == list(task.TESTS)
    for split in data.tests.values():
        assert (split.inputs, split.ids) == ([inputs] * 2, ["7", "2"])
        assert split.answers is None


@pytest.mark.parametrize("name", list(TASKS))
def test_damaged_files_end_in_one_line(tmp_path, name):
    check_damage(write_task(name, tmp_path).load, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("afqmc", {"label": "2"}, "line 1: label '2' is none of 0, 1"),
        ("afqmc", {"label": 1}, "line 1: expected an object such as"),
        ("afqmc", {"sentence2": None}, "line 1: expected"),
        ("csl", {"keyword": []}, "line 1: expected"),
        ("csl", {"keyword": ["甲", 1]}, "line 1: expected"),
        ("cmnli", {"label": "-"}, "has no labelled example"),
        ("cluewsc2020", {"target": {**TARGET, "span2_index": 4}}, "'他' is not at character 4"),
        ("cluewsc2020", {"target": {**TARGET, "span1_text": ""}}, "'' is not at character 0"),
        ("cluewsc2020", {"target": {"span1_index": 0}}, "line 1: expected"),
    ],
)
def test_bad_lines(tmp_path, name, change, message):
    task = write_task(name, tmp_path)
    line, _, labels, train = TASKS[name]
    write_lines(tmp_path / train, [{**line, "label": labels[0], **change}])
    with pytest.raises(UserError, match=f"{train}.*{message}"):
        task.load(tmp_path)


def test_a_test_has_every_id_once(tmp_path):
    task = write_task("afqmc", tmp_path)
    write_lines(tmp_path / "test.json", [{**PAIR, "id": 7}] * 2)
    with pytest.raises(UserError, match=r"test\.json has an id twice"):
        task.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "7", "label": "0"}\n{"id": "2", "label": "1"}', None),
        ('{"id": "7", "label": "0"}', "1 answers to 2 examples"),
        ('{"id": "2", "label": "0"}\n{"id": "7", "label": "1"}', "answer 1 has the id '2'"),
        (
            '{"id": 7, "label": "0"}\n{"id": "2", "label": "1"}',
            "answer 1 has the id 7, not '7'",
        ),
        ('{"id": "7", "label": "0"}\n{"id": "2", "label": "2"}', "'2' is no answer to .* 2"),
        ('{"id": "7", "label": "0"}\n{"id": "2", "label": ["0"]}', "no answer"),
        ('{"id": "7", "label": "0"}\n{"id": "2"}', "line 2: expected"),
        ('{"id": "7", "lab', "Unterminated string"),
    ],
)
def test_submissions_are_checked(tmp_path, text, message):
    task = write_task("afqmc", tmp_path)
    data = task.load(tmp_path)
    test = data.tests["afqmc_predict.json"]
    if message is None:
        check(text, test, data, task)
    else:
        with pytest.raises(ValueError, match=message):
            check(text, test, data, task)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("afqmc", [34334, 4316, 3861]),
        ("iflytek", [4529, 2599, 2600]),  # of its train, 12,133 lines, a part is here
        ("ocnli", [50437, 2950, 3000]),
        ("cluewsc2020", [1244, 304, 290, 2574]),
        ("csl", [20000, 3000, 3000]),
    ],
)
def test_counts_of_the_official_files(shared, name, counts):
    data = importlib.import_module(name).load(shared / "clue" / name)
    assert [len(split) for split in data.splits] == counts
    assert set(data.train.answers) == set(range(len(data.labels)))


@pytest.mark.real_data
def test_pairs_of_cmnli_without_agreement_are_left_out(shared, tmp_path):
    for file in ("dev.json", "test.json"):
        (tmp_path / file).symlink_to(shared / "clue" / "cmnli" / file)
    (tmp_path / "train.json").symlink_to(shared / "clue" / "cmnli" / "dev.json")
    data = importlib.import_module("cmnli").load(tmp_path)
    assert len(data.dev) == 12241
    assert [data.dev.answers.count(index) for index in range(3)] == [4277, 3926, 4038]
