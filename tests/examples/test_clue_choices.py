"""C3 and ChID: files, rows, masked choices, assignment, and a run of each."""

import json
import random

import c3
import chid
import exclusive_choice
import keras
import multiple_choice
import numpy as np
import pytest
import run
import submit
from c3 import Question, cut_longest
from chid import Blank
from clue_files import check_damage, write_lines
from data import Split, TaskData
from errors import UserError
from settings import resolve

from keras_ext.text import BucketedBatches, WordPieceTokenizer

TEXTS = "他去了学校公园很好"
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXTS])
# Without dropout: XLA takes long to compile random numbers.
TINY = ["--layers", "1", "--hidden", "16", "--epochs", "1", "--batch-size", "4"]
TINY += ["--dropout", "0", "--head-dropout", "0"]


def read(tokens):
    return "".join(TOKENIZER.id_to_token(int(id_)) for id_ in tokens if id_)


def encode(examples, head=multiple_choice, answers=None, **given):
    settings = resolve("c3", "scratch", given)
    return head.encode(TOKENIZER, Split(examples, answers), None, settings)


def write(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# Rows


def test_rows_of_c3():
    examples = [
        Question("他去了", "去", ("学校", "公园")),
        Question("学校很好", "很", ("他", "了", "园")),
    ]
    first, second = encode(examples, max_length=10).token_ids
    assert [read(row) for row in first] == [
        "[CLS]他去了[SEP]去[SEP]学校[SEP]",
        "[CLS]他去了[SEP]去[SEP]公园[SEP]",
        "[CLS]",  # fills up
    ]
    assert read(second[2]) == "[CLS]学校很好[SEP]很[SEP]园[SEP]"
    (short,) = encode(examples[:1], max_length=8).token_ids
    assert read(short[0]) == "[CLS]他[SEP]去[SEP]学校[SEP]"


def test_the_longest_part_is_cut():
    def one_by_one(sizes, room):
        sizes = list(sizes)
        while sum(sizes) > room:
            sizes[int(np.argmax(sizes))] -= 1
        return sizes

    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 12) for _ in range(draw.choice([2, 3]))]
        room = draw.randint(0, 30)
        assert cut_longest(sizes, room) == one_by_one(sizes, room)


@pytest.mark.parametrize(
    ("left", "right", "row"),
    [
        ("他" * 20 + "学" * 10, "校" * 10 + "园" * 20, "学学学学[SEP]校校校"),
        ("学", "校" * 10 + "园" * 20, "学[SEP]校校校校校校"),
        ("他" * 20 + "学" * 10, "", "学学学学学学学[SEP]"),
        ("", "校校", "[SEP]校校"),
    ],
)
def test_the_blank_stays_where_the_outer_ends_are_cut(left, right, row):
    blank = Blank(left, right, ("去去去去", "他他他他"), line=1)
    first, second = encode([blank], max_length=15).token_ids[0]
    assert read(first) == f"[CLS]去去去去[SEP]{row}[SEP]"
    assert read(second) == f"[CLS]他他他他[SEP]{row}[SEP]"
    for length in (8, 9):  # the blank even where there is room for nothing else
        assert np.sum(encode([blank], max_length=length).token_ids[0][0] == 3) == 3


def test_the_blank_is_marked_as_in_the_reference_code():
    tokenizer = WordPieceTokenizer([*TOKENIZER.vocabulary, "[unused1]"])
    blank = Blank("学", "校", ("去",), line=1)
    ids = {text: tokenizer.encode(text).token_ids[1:-1] for text in blank}
    (row,) = blank.rows(tokenizer, ids, max_length=16)
    tokens = [tokenizer.id_to_token(id_) for id_ in row]
    assert tokens == ["[CLS]", "去", "[SEP]", "学", "[unused1]", "校", "[SEP]"]


def test_too_short_rows_are_refused():
    with pytest.raises(UserError, match="max_length must be at least 8 for this task, got 7"):
        encode([Question("他", "去", ("学", "校"))], max_length=7)


# The head


@pytest.fixture
def make_model():
    """A scorer of random weights, large enough for logits far apart, on a small encoder."""

    def make(jit_compile=False):
        keras.utils.set_random_seed(0)
        ids = [keras.Input((None,), dtype="int32") for _ in range(2)]
        vectors = keras.layers.Embedding(len(TOKENIZER.vocabulary), 8)(ids[0])
        encoder = keras.Model(ids, keras.layers.Dense(8, "tanh")(vectors))
        settings = resolve("c3", "scratch", {"head_dropout": 0.0})
        model = keras.Model(*multiple_choice.build_model(encoder, None, settings))
        kernel, _ = model.get_layer("scorer").weights
        kernel.assign(np.linspace(-50, 50, 8)[:, None])
        arguments = multiple_choice.compile_arguments(settings)
        model.compile("sgd", jit_compile=jit_compile, **arguments)
        return model

    return make


def questions(counts):
    draw = random.Random(0)
    for count in counts:
        parts = ["".join(draw.choices(TEXTS, k=2)) for _ in range(count + 2)]
        yield Question(parts[0], parts[1], tuple(parts[2:]))


@pytest.mark.parametrize("width", [4, 10])
def test_missing_choices_never_win(make_model, width):
    model, counts = make_model(), [2, 3, width, 2]
    examples = list(questions(counts))
    token_ids = np.stack(encode(examples).token_ids)
    logits = model.predict_on_batch([token_ids, np.zeros_like(token_ids)])
    assert logits.shape == (4, width)
    for row, count, ids in zip(logits, counts, token_ids, strict=True):
        assert np.all(row[count:] < row[:count].min() - 1e6)
        alone = ids[None, :count]  # the same without filling
        np.testing.assert_allclose(
            model.predict_on_batch([alone, np.zeros_like(alone)])[0], row[:count], rtol=1e-4
        )


def test_loss_and_gradient_are_those_of_the_choices_there_are(make_model):
    model = make_model()
    counts, answers, smoothing = [2, 3, 4, 2], [1, 2, 0, 0], 0.1
    rows = encode(list(questions(counts)), answers=answers, label_smoothing=smoothing)
    token_ids = np.stack(rows.token_ids)
    inputs = [token_ids, np.zeros_like(token_ids)]
    logits = model.predict_on_batch(inputs).astype("float64")
    losses = []
    for row, count, answer in zip(logits, counts, answers, strict=True):
        row = row[:count] - row[:count].max()
        log = row - np.log(np.exp(row).sum())
        losses.append(-(1 - smoothing) * log[answer] - smoothing * log.mean())
    weight = np.array([1, 1, 1, 0], "float32")
    figures = model.test_on_batch(inputs, rows.targets, weight, return_dict=True)
    np.testing.assert_allclose(figures["crossentropy"], np.mean(losses[:3]), rtol=1e-4)


def jit_options():
    return {"tensorflow": [False, True], "jax": [True]}.get(keras.backend.backend(), [False])


@pytest.mark.parametrize("jit_compile", jit_options())
def test_fit_over_several_lengths(make_model, jit_compile):
    """And predictions for another number of choices than those of training."""
    model = make_model(jit_compile)
    examples = [*questions([2, 3, 4, 2]), *(Question(TEXTS * 2, "去", ("他", "了")),) * 2]
    rows = encode(examples, answers=[1, 2, 0, 0, 1, 1], label_smoothing=0.1)
    batches = BucketedBatches(rows.token_ids, rows.targets, batch_size=4, seed=0)
    assert (batches.lengths, len(batches)) == ([16, 24], 2)
    before = model.get_weights()
    model.fit(batches, shuffle=False, verbose=0)
    after = model.get_weights()
    assert all(np.isfinite(array).all() for array in after)
    assert (before[0] != after[0]).any()  # the embeddings
    wider = BucketedBatches(encode(list(questions([2, 10]))).token_ids, batch_size=4)
    logits = wider.restore(model.predict(wider, verbose=0))
    assert logits.shape == (2, 10)
    assert logits[0].argmax() < 2


# Assignment


def blanks(lines, width=3):
    return [Blank("", "", ("去",) * width, line) for line in lines]


def test_assignment_is_a_permutation_and_beats_the_best_of_each():
    # The third blank is sure of 0 and the first one nearly as much; argmax takes 0 twice.
    logits = np.array([[3.0, 2.9, 0], [0, 0, 1], [9, 0, 0], [1, 0, 0]], "float32")
    split = Split(blanks([1, 1, 1, 2]), [1, 2, 0, 0])
    assert list(exclusive_choice.assign(logits, split)) == [1, 2, 0, 0]
    figures = exclusive_choice.score(logits, split, None)
    assert (figures["accuracy"], figures["accuracy_argmax"]) == (1.0, 0.75)
    data = TaskData([0, 1, 2], split, split, {})
    assert exclusive_choice.predictions(logits, split, None, data) == [1, 2, 0, 0]


def test_assignment_of_odd_lines():
    logits = np.array([[0, 0, 5.0], [1, 0, 5], [0, 0, 7], [0, 1, 9], [2, 0, 0]], "float32")
    assign = exclusive_choice.assign
    # More blanks than candidates: as few use one again as possible.
    assert sorted(assign(logits, Split(blanks([1] * 5)))) in ([0, 0, 1, 1, 2], [0, 0, 1, 2, 2],
                                                              [0, 1, 1, 2, 2])  # fmt: skip
    # Two candidates where other lines have three: the third column is filling.
    assert sorted(assign(logits[:2], Split(blanks([1, 1], width=2)))) == [0, 1]
    logits[0] = np.nan
    assert sorted(assign(logits[:3], Split(blanks([1] * 3)))) == [0, 1, 2]


# Official files


@pytest.fixture
def c3_files(tmp_path):
    """A directory of the six official files, self-written, one with Windows line ends."""

    def passages(count, most, **last):
        draw = random.Random(count)
        for index in range(count):
            text = "".join(draw.choices(TEXTS, k=4))
            choices = draw.sample(TEXTS, draw.randint(2, most))
            values = {"answer": choices[-1], "id": last.get("id", 0) + index}
            (key,) = {"id", "answer"} & last.keys()
            question = {"question": "去？", "choice": choices, key: values[key]}
            yield [[text, "很好"], [question], *(["7-1"] if key == "answer" else [])]

    for count, name in ((9, "m-train"), (6, "d-train"), (5, "m-dev"), (3, "d-dev")):
        write(tmp_path / f"{name}.json", list(passages(count, 4, answer="")))
    write(tmp_path / "test1.0.json", list(passages(5, 4, id=508))[::-1])
    write(tmp_path / "test1.1.json", list(passages(6, 7, id=0)))
    text = json.dumps(list(passages(9, 4, answer="")), indent=1).replace("\n", "\r\n")
    (tmp_path / "m-train.json").write_bytes(text.encode())
    return tmp_path


@pytest.fixture
def chid_files(tmp_path):
    """A directory of the six official files, self-written."""
    start = 0
    for name, count in (("train", 5), ("dev", 3), ("test1.0", 3), ("test1.1", 2)):
        lines, answers = [], {}
        for index in range(count):
            ids = [f"#idiom{start + number:06d}#" for number in range(3)]
            start += 3
            content = [f"他{ids[0]}，很好{ids[1]}。", f"{ids[2]}公园" + "很" * 40 * (index % 2)]
            lines.append(
                {"content": content, "candidates": [x * 4 for x in TEXTS] + ["人" * 4]}
            )
            answers |= {id_: (index + 2 * number) % 10 for number, id_ in enumerate(ids)}
        write_lines(tmp_path / f"{name}.json", lines)
        if name in ("train", "dev"):
            write(tmp_path / f"{name}_answer.json", answers)
    return tmp_path


@pytest.mark.parametrize("task", [c3, chid])
def test_damaged_files_end_in_one_line(task, request):
    check_damage(task.load, request.getfixturevalue(f"{task.__name__}_files"))


def test_answers_of_c3_are_indices_of_their_texts(c3_files):
    data = c3.load(c3_files)
    assert [len(split) for split in data.splits] == [15, 8, 5, 6]
    entries = [
        *json.loads((c3_files / "m-train.json").read_text()),
        *json.loads((c3_files / "d-train.json").read_text()),
    ]
    for example, answer, entry in zip(
        data.train.inputs, data.train.answers, entries, strict=True
    ):
        assert example.passage == "||".join(entry[0])
        assert example.choices[answer] == entry[1][0]["answer"]


def test_blanks_of_chid(chid_files):
    data = chid.load(chid_files)
    assert [len(split) for split in data.splits] == [15, 9, 9, 6]
    first, second, third = data.train.inputs[:3]
    assert (first.left, first.right) == ("他", "，很好[MASK][MASK][MASK][MASK]。")
    assert (second.left, second.right) == ("他[MASK][MASK][MASK][MASK]，很好", "。")
    assert (third.left, third.right, third.line) == ("", "公园", 1)
    assert data.train.answers[:6] == [0, 2, 4, 1, 3, 5]


def test_without_any_test_chid_has_no_submission(chid_files, capsys):
    (chid_files / "test1.0.json").unlink()
    with pytest.raises(UserError, match=r"test1\.0\.json is missing: unpack"):
        chid.load(chid_files)
    (chid_files / "test1.1.json").unlink()
    assert chid.load(chid_files).tests == {}
    assert "neither test1.0.json nor test1.1.json, so no submission" in capsys.readouterr().out


GOOD = {"question": "去？", "choice": ["学校", "公园"], "answer": "公园"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[[["他"], [{"question"', "m-train.json is no JSON .*line 1"),
        ("[" * 100000, "m-train.json is no JSON"),
        ("9" * 5000, "m-train.json is no JSON"),
        ('["\\ud800"]', "m-train.json is no JSON"),
        ("{}", "m-train.json holds no list"),
        ("[]", "m-train.json holds no list"),
        ([[["他"], [GOOD]], []], "m-train.json, passage 2: expected a list such as"),
        ([[["他"]]], "passage 1: expected"),
        ([[["他"], []]], "passage 1: expected"),
        ([[["他"], [{**GOOD, "choice": []}]]], "passage 1: expected"),
        ([[["他"], [{"question": "去？", "answer": "公园"}]]], "passage 1: expected"),
        ([[["他"], [{**GOOD, "choice": ["学校", 2]}]]], "passage 1: expected"),
        ([[["他"], [{**GOOD, "answer": "园"}]]],
         "passage 1: the answer '园' is none of '学校', '公园'"),
    ],
)  # fmt: skip
def test_bad_files_of_c3(c3_files, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (c3_files / "m-train.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        c3.load(c3_files)


def test_ids_of_c3_must_differ(c3_files):
    entries = json.loads((c3_files / "test1.1.json").read_text())
    write(c3_files / "test1.1.json", [*entries, entries[0]])
    with pytest.raises(UserError, match=r"test1\.1\.json has an id twice"):
        c3.load(c3_files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", '{"content": ["#idiom0000', "train.json, line 1: expected"),
        ("train", '{"content": ["他"], "candidates": []}', "line 1: expected"),
        ("train", '{"content": ["\\ud800"], "candidates": ["去"]}', "line 1: expected"),
        ("train", '{"content": ["他"], "candidates": ["去"]}', "train.json has no blank"),
        ("test1.0", '{"content": ["#idiom000001##idiom000001#"], "candidates": ["去"]}',
         "test1.0.json has a blank twice"),
        ("train_answer", "{", "train_answer.json is no JSON"),
        ("train_answer", "[]", "train_answer.json holds no object"),
        ("train_answer", '{"#idiom000000#": 0}',
         "train_answer.json: #idiom000001# of train.json, line 1, .* from 0 to 9, got none"),
        ("train_answer", '{"#idiom000000#": true}', "from 0 to 9, got true"),
        ("train_answer", '{"#idiom000000#": 10}', "from 0 to 9, got 10"),
        ("train_answer", '{"#idiom000000#": -1}', "from 0 to 9, got -1"),
    ],
)  # fmt: skip
def test_bad_files_of_chid(chid_files, name, content, message):
    (chid_files / f"{name}.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        chid.load(chid_files)


@pytest.mark.real_data
def test_counts_of_the_official_files(shared, capsys):
    data = c3.load(shared / "clue" / "c3")
    assert [len(split) for split in data.splits] == [11869, 3816, 3892, 1625]
    sizes = [{len(question.choices) for question in split.inputs} for split in data.splits]
    assert sizes == [{2, 3, 4}] * 3 + [{3, 4, 5, 7, 8, 9, 10}]
    assert data.tests["c310_predict.json"].ids[:2] == ["508", "3298"]
    data = chid.load(shared / "clue" / "chid")  # not the official split
    assert [len(split) for split in data.splits] == [1704, 702]


# From the files to the submission


def finished(task, files, max_length, tmp_path):
    """The directory of a run, whose submission is accepted."""
    output = tmp_path / "run"
    command = [task, "--data", str(files), *TINY, "--max-length", str(max_length)]
    backend = ["--backend", keras.backend.backend()]
    assert run.main([*command, *backend, "--output", str(output)]) == 0
    assert submit.main([str(output), "--output", str(tmp_path / "submit.zip")]) == 0
    return output


@pytest.mark.thorough
def test_a_run_of_c3(c3_files, tmp_path):
    output = finished("c3", c3_files, 24, tmp_path)
    for name, file in c3.TESTS.items():
        lines = [json.loads(line) for line in (output / name).read_text().splitlines()]
        tests = [
            part for entry in json.loads((c3_files / file).read_text()) for part in entry[1]
        ]
        assert [line["id"] for line in lines] == [str(part["id"]) for part in tests]
        for line, part in zip(lines, tests, strict=True):
            assert list(line) == ["id", "label"]
            assert line["label"] in map(str, range(len(part["choice"])))


@pytest.mark.thorough
def test_a_run_of_chid(chid_files, tmp_path):
    output = finished("chid", chid_files, 16, tmp_path)
    for name, file in chid.TESTS.items():
        answers = json.loads((output / name).read_text())
        lines = (chid_files / file).read_text(encoding="utf-8").splitlines()
        ids = [
            [id_ for text in json.loads(line)["content"] for id_ in chid.BLANK.findall(text)]
            for line in lines
        ]
        assert list(answers) == [id_ for line in ids for id_ in line]
        assert all(type(answer) is int for answer in answers.values())
        for line in ids:
            assert len({answers[id_] for id_ in line}) == len(line)
    result = json.loads((output / "result.json").read_text())
    assert {"dev_accuracy", "dev_accuracy_argmax"} <= result.keys()
