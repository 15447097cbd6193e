"""CMRC2018: files, windows, scores, decoding, and a run from files to predictions."""

import json

import cmrc2018
import keras
import numpy as np
import pytest
import run
import span_extraction
import submit
from clue_files import check_damage
from data import Split, TaskData
from errors import UserError
from metrics import exact_match, f1_score, to_units
from nltk.tokenize import NLTKWordTokenizer
from settings import Settings

from keras_ext.layers.global_pointer import MASKED
from keras_ext.text import WordPieceTokenizer, build_vocabulary

CONTEXT = (
    "2008年，小明（Xiao Ming）从上海搬到北京，"
    "住在海淀区中关村大街27号。他喜欢读书，也喜欢下棋。"
)
TRUE = [
    ("小明在哪一年搬家？", "2008年"),
    ("小明住在哪里？", "海淀区中关村大街27号"),
    ("谁搬家？", "Xiao Ming"),
]


def paragraph(pairs, number=0, **answer):
    qas = [
        {
            "id": f"Q_{number}_{i}",
            "question": question,
            "answers": [{"text": text, "answer_start": CONTEXT.find(text), **answer}],
        }
        for i, (question, text) in enumerate(pairs)
    ]
    return {"paragraphs": [{"id": f"P_{number}", "context": CONTEXT, "qas": qas}]}


def write(path, *entries):
    document = {"version": "v1.0", "data": list(entries)}
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "train.json", *(paragraph(TRUE, number) for number in range(4)))
    write(tmp_path / "dev.json", paragraph(TRUE))
    fake = {"text": "FAKE_ANSWER_1", "answer_start": -1}
    write(tmp_path / "test.json", paragraph(TRUE[::-1], 7, **fake), paragraph(TRUE, 1, **fake))
    return tmp_path


@pytest.fixture
def data(directory):
    return cmrc2018.load(directory)


@pytest.fixture
def tokenizer():
    texts = [CONTEXT, *(question for question, _ in TRUE)]
    return WordPieceTokenizer(build_vocabulary(texts, min_count=1, word_min_count=1))


def test_questions_answers_and_ids(data):
    assert data.dev.inputs == [(question, CONTEXT) for question, _ in TRUE]
    assert data.dev.answers[1] == [("海淀区中关村大街27号", CONTEXT.find("海淀区"))]
    (test,) = data.tests.values()
    assert test.ids == ["Q_7_0", "Q_7_1", "Q_7_2", "Q_1_0", "Q_1_1", "Q_1_2"]
    assert test.answers is None
    assert cmrc2018.is_answer("北京，", test.inputs[0], data)
    assert not cmrc2018.is_answer("南京", test.inputs[0], data)
    assert not cmrc2018.is_answer(None, test.inputs[0], data)


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("北京", CONTEXT.find("北京"), CONTEXT.find("北京")),
        ("北京", CONTEXT.find("北京") + 1, CONTEXT.find("北京")),
        ("喜欢", CONTEXT.rfind("喜欢"), CONTEXT.rfind("喜欢")),  # not the first one
        ("喜欢", -1, CONTEXT.find("喜欢")),
        ("号。", 10**30, CONTEXT.find("号。")),
        ("南京", 3, None),
        (" ", 3, None),
    ],
)
def test_answers_that_are_elsewhere_are_found_again(tmp_path, text, start, found):
    answer = {"text": text, "answer_start": start}
    write(tmp_path / "train.json", paragraph(TRUE[:1], **answer))
    assert cmrc2018.read(tmp_path / "train.json").answers == [[(text, found)]]


QUESTION = '{"id": "Q", "question": "谁？", "answers": [{"text": "他", "answer_start": 0}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.json is missing: unpack"),
        ("", "train.json is empty"),
        ('{"data": [{"paragraphs": [', r"train.json is no JSON \(Expecting value: line 1"),
        ("[" * 100_000, "train.json is no JSON"),
        ("[]", r'train.json: expected an object such as {"data": \[{}\]}, got \[\]'),
        ('{"data": []}', "train.json: expected"),
        ('{"data": [{}, 1]}', "train.json: expected"),
        ('{"data": [{"context_text": "他"}]}', 'data entry 1: expected .* got {"context_text"'),
        ('{"data": [{"paragraphs": [{"context": 1, "qas": [{}]}]}]}', "data entry 1: expected"),
        ('{"data": [{"paragraphs": [{"context": "他", "qas": []}]}]}', "data entry 1: expec"),
        (QUESTION.replace('"谁？"', "null"), "data entry 1, paragraph 1, question 2: "),
        (QUESTION.replace("answers", "answer"), 'question 2: expected .*"answers": '),
        (QUESTION.replace('[{"text": "他", "answer_start": 0}]', "[]"), "question 2: expected"),
        (QUESTION.replace('{"text": "他", "answer_start": 0}', '"他"'), "question 2: expected"),
        (QUESTION.replace(": 0", ": 0.5"), "question 2: expected"),
        (QUESTION.replace("谁", "\\ud800"), "train.json is no JSON .*surrogates"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, content, message):
    if content is not None:
        if content.startswith('{"id"'):
            qas = f"[{QUESTION}, {content}]"
            content = f'{{"data": [{{"paragraphs": [{{"context": "他", "qas": {qas}}}]}}]}}'
        (tmp_path / "train.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        cmrc2018.load(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_damaged_files_end_in_one_line(directory):
    check_damage(cmrc2018.load, directory)


def test_ids_of_a_test_are_unique(directory):
    write(directory / "test.json", paragraph(TRUE), paragraph(TRUE))
    with pytest.raises(UserError, match="has an id twice"):
        cmrc2018.load(directory)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 30])
@pytest.mark.parametrize(("size", "stride"), [(8, 3), (8, 8), (8, 99), (1, 1)])
def test_windows_cover_the_text(length, size, stride):
    windows = span_extraction.windows(length, size, stride)
    assert sorted({i for window in windows for i in range(*window)}) == list(range(length))
    assert all(end - start == size for start, end in windows[:-1])
    assert windows[-1][1] == length
    assert all(
        end < length for _, end in windows[:-1]
    )  # the first to reach the end is the last
    starts = [start for start, _ in windows]
    assert np.all(np.diff(starts) == min(size, stride))


@pytest.mark.parametrize(("max_length", "stride"), [(64, 128), (32, 6), (26, 5)])
def test_training_windows_hold_the_whole_answer_or_nothing_of_it(
    data, tokenizer, max_length, stride
):
    settings = Settings(max_length=max_length, stride=stride)
    rows = span_extraction.encode(tokenizer, data.train, data, settings)
    assert rows.targets.shape == (len(rows.token_ids), 2)
    with_answer = set()
    for ids, target, window in zip(rows.token_ids, rows.targets, rows.notes, strict=True):
        assert len(ids) <= max_length
        ((text, start),) = data.train.answers[window.example]
        if target.any():
            with_answer.add(window.example)
            assert window.text(target, CONTEXT) == text
            continue
        first, last = ids.index(3) + 1, len(ids) - 2  # between the [SEP]
        seen = range(
            window.offsets[first - window.shift][0], window.offsets[last - window.shift][1]
        )
        assert not set(seen) & set(range(start, start + len(text)))
    assert with_answer == set(range(len(data.train)))


def test_other_splits_are_cut_up_without_their_answers(data, tokenizer):
    settings = Settings(max_length=32, stride=6)
    rows = span_extraction.encode(tokenizer, data.dev, data, settings)
    unanswered = Split(data.dev.inputs, ids=["a", "b", "c"])
    assert rows == span_extraction.encode(tokenizer, unanswered, data, settings)
    question = tokenizer.encode(TRUE[1][0]).token_ids  # with [CLS] and [SEP]
    context = tokenizer.encode(CONTEXT).token_ids[1:-1]
    mine = [ids for ids, w in zip(rows.token_ids, rows.notes, strict=True) if w.example == 1]
    room = 32 - len(question) - 1
    for number, ids in enumerate(mine):
        assert ids == [*question, *context[6 * number :][:room], 3]
    assert 6 * (len(mine) - 1) + room >= len(context)


def test_an_answer_is_all_tokens_that_it_has_a_part_of():
    offsets = [(0, 4), (4, 5), (6, 8)]  # "2008年 小明", tokens 2008, 年, 小明
    for answers, span in (
        ([("08年", 2)], (0, 1)),
        ([("年 ", 4)], (1, 1)),
        ([("南京", None), ("明", 7)], (2, 2)),
        ([("南京", None)], None),
    ):
        assert span_extraction.answer_span(answers, offsets) == span


def test_special_tokens_in_a_text_are_unknown_and_long_questions_leave_room(tokenizer):
    split = Split([("[SEP]" * 30, "[CLS]北京[PAD]"), ("", " ")], ids=["a", "b"])
    data = TaskData([], Split([]), Split([]), {"x": split})
    settings = Settings(max_length=11)
    rows = span_extraction.encode(tokenizer, split, data, settings)
    north, capital = map(tokenizer.token_to_id, "北京")
    assert rows.token_ids == [[2, 1, 1, 1, 1, 3, 1, north, capital, 1, 3], [2, 3, 3]]
    mask = span_extraction.span_mask(np.array([rows.token_ids[0], [2, 3, 3] + 8 * [0]]))
    assert keras.ops.convert_to_numpy(mask).tolist() == [
        [True] + 5 * [False] + 4 * [True] + [False],
        [True] + 10 * [False],
    ]
    outputs = [(1.0, (7, 8)), (MASKED, (1, 1))]
    assert span_extraction.predictions(outputs, split, rows, data) == ["北京", ""]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 4}, "max_length must be at least 5 for spans, got 4"),
        ({"max_length": 5}, "no answer of train fits"),
        ({"pooling": "mean"}, "pooling has no meaning for spans: leave out --pooling"),
        ({"label_smoothing": 0.1}, "leave out --label-smoothing"),
    ],
)
def test_settings_without_effect_are_refused(data, tokenizer, settings, message):
    data.train.answers[:] = [[("南京", None)]] * len(data.train)
    with pytest.raises(UserError, match=message):
        span_extraction.encode(tokenizer, data.train, data, Settings(**settings))


def test_the_best_span_of_all_windows_wins():
    scores = np.full((3, 5, 5), MASKED, "float32")
    scores[0, 0, 0] = scores[0, 0, 3] = 99  # [CLS]
    scores[0, 2, 3], scores[1, 3, 3], scores[2, 2, 4] = 1.5, 2.5, -1
    outputs = span_extraction.decode(scores)
    assert outputs == [(1.5, (2, 3)), (2.5, (3, 3)), (-1.0, (2, 4))]

    offsets = [(i, i + 1) for i in range(6)]
    notes = [
        span_extraction.Window(*note)
        for note in ((0, offsets, 2), (0, offsets, -1), (1, offsets, 1))
    ]
    split = Split(
        [("", "天地玄黄宇宙"), ("", "日月盈昃辰宿")],
        answers=[[("宙", 5)], [("月", 1), ("月盈昃", 1)]],
    )
    rows = span_extraction.Rows([], None, notes)
    assert span_extraction.predictions(outputs, split, rows, None) == ["宇", "月盈昃"]
    assert span_extraction.score(outputs, split, rows) == {"em": 0.5, "f1": 0.5}


def test_loss_is_softmax_crossentropy_over_all_spans():
    random = np.random.default_rng(0)
    scores, spans = random.normal(size=(3, 4, 4)), np.array([[0, 0], [1, 3], [2, 2]])
    scores[:, 3, 1] = MASKED
    flat = np.exp(scores.reshape(3, 16))
    losses = [-np.log(flat[i, 4 * a + b] / flat[i].sum()) for i, (a, b) in enumerate(spans)]
    weights, scores = np.array([1.0, 1.0, 0.0], "float32"), scores.astype("float32")
    arguments = span_extraction.compile_arguments(Settings())
    (metric,) = arguments["weighted_metrics"]
    metric.update_state(spans, scores, weights)
    for value in (arguments["loss"](spans, scores, weights), metric.result()):
        np.testing.assert_allclose(float(value), np.mean(losses[:2]), rtol=1e-5)
    assert metric.name == "crossentropy"


def test_units_are_characters_and_words():
    assert to_units(" 他在USS Port-Royal（CG-73）上，3.5年 ") == [
        *"他在",
        "uss",
        "portroyalcg73",
        *"上",
        "3.5",
        "年",
    ]


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("北京", ["北京"], 1, 1),
        ("《北京》。", ["「北-京」"], 1, 1),  # punctuation of the list
        ("北京!", ["北京"], 0, 4 / 5),  # ! is not in it, and a unit
        (" Deep Blue", ["deep blue "], 1, 1),
        ("deepblue", ["deep blue"], 0, 0),
        ("Deep Blue电脑", ["deep blue"], 0, 4 / 6),
        ("北京市海淀区", ["海淀区"], 0, 6 / 9),
        ("天地玄黄", ["天地和玄"], 0, 4 / 8),  # contiguous: a subsequence has 3
        ("", ["北京"], 0, 0),
        ("，", ["北京"], 0, 0),
        ("海淀", ["北京", "海淀区", "北京海淀"], 0, 4 / 5),  # the best of three
        ("海淀", ["北京", "上海", "海淀"], 1, 1),
    ],
)  # fmt: skip
def test_official_scores_by_hand(prediction, answers, em, f1):
    assert exact_match(prediction, answers) == em
    assert f1_score(prediction, answers) == pytest.approx(f1)


def f1_of_the_official_script(prediction, answer):
    """A transcription of its steps, character by character."""
    both = []
    for text in (prediction, answer):
        units, run_of_others = [], ""
        for character in text.lower().strip() + "中":  # a last one, to be taken off again
            if character in "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』":
                continue
            if "\u4e00" <= character <= "\u9fa5":
                units += [*NLTKWordTokenizer().tokenize(run_of_others), character]
                run_of_others = ""
            else:
                run_of_others += character
        both.append(units[:-1])
    one, other = both
    common = np.zeros((len(one) + 1, len(other) + 1), int)  # length of the run that ends there
    for i, j in np.ndindex(len(one), len(other)):
        common[i + 1, j + 1] = common[i, j] + 1 if one[i] == other[j] else 0
    if not common.max():
        return 0.0
    precision, recall = common.max() / len(one), common.max() / len(other)
    return 2 * precision * recall / (precision + recall)


def test_f1_equals_the_official_script():
    random = np.random.default_rng(0)
    for _ in range(200):
        one, other = ("".join(random.choice([*"天地，a.(3 "], 6)) for _ in range(2))
        expected = f1_of_the_official_script(one, other)
        assert f1_score(one, [other]) == pytest.approx(expected)


@pytest.mark.thorough
def test_from_the_files_to_the_predictions(directory, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--layers", "1", "--hidden", "16", "--epochs", "1", "--batch-size", "8"]
    flags += ["--max-length", "40", "--stride", "8"]  # rows of one bucket length
    backend = keras.backend.backend()
    command = ["cmrc2018", "--data", str(directory), "--backend", backend, *flags]
    assert run.main([*command, "--output", str(output)]) == 0
    predicted = json.loads((output / "cmrc2018_predict.json").read_text(encoding="utf-8"))
    assert list(predicted) == ["Q_7_0", "Q_7_1", "Q_7_2", "Q_1_0", "Q_1_1", "Q_1_2"]
    assert all(text and text in CONTEXT for text in predicted.values())
    result = json.loads((output / "result.json").read_text())
    assert result["metric"] == "em"
    assert 0 <= result["dev_em"] <= result["dev_f1"] <= 1
    assert np.isfinite(result["loss"])
    assert submit.main([str(output), "--output", str(tmp_path / "submit.zip")]) == 0


@pytest.mark.real_data
def test_counts_of_the_official_files(shared):
    directory = shared / "clue" / "cmrc2018"
    official = cmrc2018.load(directory)
    trial = cmrc2018.read(directory / "trial.json")
    assert [len(split) for split in (*official.splits, trial)] == [10142, 3219, 2000, 1002]
    assert {len(answers) for answers in official.dev.answers} == {3}
    absent = [
        sum(start is None for answers in split.answers for _, start in answers)
        for split in (official.train, official.dev)
    ]
    assert absent == [0, 193]
    texts = [[text for text, _ in answers] for answers in official.dev.answers]
    assert all(
        exact_match(three[0], three) == f1_score(three[2], three) == 1 for three in texts
    )


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("train", 21), ("dev", 200)])
def test_mismatched_answers_of_the_official_files(shared, name, count):
    path = shared / "clue" / "cmrc2018" / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    given = [
        answer["answer_start"]
        for entry in document["data"]
        for part in entry["paragraphs"]
        for question in part["qas"]
        for answer in question["answers"]
    ]
    read = [start for answers in cmrc2018.read(path).answers for _, start in answers]
    assert sum(a != b for a, b in zip(given, read, strict=True)) == count
