import json
import random

import cluener
import entities
import entities_crf
import keras
import numpy as np
import pytest
import run
from clue_files import TINY, check_damage, write_lines
from data import Rows, Split
from entities import Entity
from entities_global_pointer import decode, span_lists
from errors import UserError
from mean_loss import MeanLoss

from keras_ext.layers.crf import CRF
from keras_ext.losses import MultilabelCrossentropy
from keras_ext.text import WordPieceTokenizer

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"在的赢了", "war", "##3", "2011", "vs", "##gsl"]
NAME, GAME = cluener.LABELS.index("name"), cluener.LABELS.index("game")


def write(directory, train="", dev="", test=""):
    line = {"text": "叶老桂说", "label": {"name": {"叶老桂": [[0, 2]]}}}
    content = json.dumps(line, ensure_ascii=False)
    (directory / "train.json").write_text(train or content, encoding="utf-8")
    (directory / "dev.json").write_text(dev or content, encoding="utf-8")
    (directory / "test.json").write_text(test or '{"id": 7, "text": "说"}', encoding="utf-8")


def test_spans_are_inclusive_and_in_order(tmp_path):
    label = {"name": {"李": [[5, 5], [0, 0]]}, "game": {"李在李": [[0, 2]]}, "book": {}}
    write(tmp_path, train=json.dumps({"text": "李在李，的李", "label": label}))
    loaded = cluener.load(tmp_path)
    assert loaded.train.answers == [[(GAME, 0, 2), (NAME, 0, 0), (NAME, 5, 5)]]
    assert loaded.dev.answers == [[Entity(NAME, 0, 2)]]
    assert loaded.tests["cluener_predict.json"] == Split(["说"], ids=["7"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "花"}', "line 1: expected an object"),
        ('{"text": "花", "label": []}', "line 1: expected an object"),
        ('{"text": "花", "label": {"name": {"花": [[0', "line 1: expected an object"),
        ('{"text": "花", "label": {}}\n\n', None),
        ('{"text": "花", "label": {}}\n{"text": "花", "label": {"plant": {"花": [[0, 0]]}}}',
         "line 2: type 'plant' is none of address, book"),
        ('{"text": "花", "label": {"name": ["花"]}}', "line 1: name must be an object such as"),
        ('{"text": "花", "label": {"name": {"花": [0, 0]}}}', "line 1: name must be an object"),
        ('{"text": "花", "label": {"name": {"花": []}}}', "line 1: name must be an object"),
        ('{"text": "花", "label": {"name": {"花": [["0", 0]]}}}', "name must be an object"),
        ('{"text": "花", "label": {"name": {"花": [[0]]}}}', "line 1: name must be an object"),
        ('{"text": "花", "label": {"name": {"草": [[0, 0]]}}}', "0 of the text are not '草'"),
        ('{"text": "花", "label": {"name": {"花": [[0, 1]]}}}', "1 of the text are not '花'"),
        ('{"text": "花", "label": {"name": {"花": [[-1, 0]]}}}', "-1 to 0 of the text are not"),
        ('{"text": "花草", "label": {"name": {"": [[1, 0]]}}}', "1 to 0 of the text are"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, content, message):
    write(tmp_path, train=content)
    if message is None:
        assert len(cluener.load(tmp_path).train) == 1
        return
    with pytest.raises(UserError, match=message) as error:
        cluener.load(tmp_path)
    assert "train.json, " in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("unpack the official archive again.")


def test_damaged_files_end_in_one_line(tmp_path):
    write(tmp_path)
    check_damage(cluener.load, tmp_path)


def test_an_id_twice(tmp_path):
    write(tmp_path, test='{"id": 7, "text": "说"}\n{"id": 7, "text": "的"}')
    with pytest.raises(UserError, match=r"test\.json has an id twice"):
        cluener.load(tmp_path)


def test_submission_repeats_the_test_line_and_reads_back():
    # U+2028 ends a line for Python, not for JSON.
    split = Split(["李在\u2028李", "的"], ids=["3", "0"])
    rows = Rows([], None, [[(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (0, 0)], [(0, 0)] * 2])
    found = [[Entity(NAME, 1, 1), Entity(NAME, 4, 4), Entity(GAME, 1, 2)], []]
    data = cluener.TaskData(cluener.LABELS, split, split, {})
    answers = entities.predictions(found, split, rows, data)
    text = cluener.FORMAT.write(split, answers)
    label = '{"game": {"李在": [[0, 1]]}, "name": {"李": [[0, 0], [3, 3]]}}'
    first, second, rest = text.split("\n")
    assert first == f'{{"id": 3, "text": "李在\u2028李", "label": {label}}}'
    assert (second, rest) == ('{"id": 0, "text": "的", "label": {}}', "")
    read = cluener.FORMAT.read(text)
    assert read == [("3", answers[0]), ("0", {})]
    assert cluener.is_answer(read[0][1], split.inputs[0], data)
    assert not cluener.is_answer(read[0][1], split.inputs[1], data)


@pytest.mark.parametrize("text", ["", "[]", '{"id": "3", "text": "", "label": {}}'])
def test_what_is_no_submission(text):
    with pytest.raises(ValueError, match=r"line 1"):
        cluener.FORMAT.read(text)


def test_score_by_hand():
    """One of three right, of four: P 1/3, R 1/4, F1 2/7. The mean of the texts' F1 is not."""
    offsets = [(0, 0), (0, 1), (1, 3), (3, 4), (0, 0)]
    found = [[Entity(0, 1, 2), Entity(1, 3, 3)], [Entity(0, 1, 1)]]  # in tokens
    answers = [[Entity(0, 0, 2), Entity(0, 3, 3)], [Entity(0, 0, 1), Entity(2, 0, 0)]]
    rows, split = Rows([], None, [offsets] * 2), Split(["abcd"] * 2, answers)
    figures = entities.score(found, split, rows)
    assert figures == pytest.approx({"f1": 2 / 7, "precision": 1 / 3, "recall": 1 / 4})
    assert entities.score([[], []], split, rows) == {"f1": 0, "precision": 0, "recall": 0}
    # What spans [CLS] or [SEP] is nothing, and twice the same characters are one entity.
    found = [[Entity(0, 0, 2), Entity(0, 1, 4), Entity(0, 1, 2), Entity(0, 1, 2)], []]
    assert entities.score(found, split, rows)["precision"] == 1


def test_tokens_of_latin_words_and_digits():
    """[CLS] war ##3 在 2011 的 vs ##gsl [SEP]"""
    text = "War3在 2011的vsGSL"
    offsets = WordPieceTokenizer(TOKENS).encode(text).offsets
    assert offsets[1:-1] == [(0, 3), (3, 4), (4, 5), (6, 10), (10, 11), (11, 13), (13, 16)]
    exact = {(0, 3): (1, 2), (0, 2): (1, 1), (6, 9): (4, 4), (13, 15): (7, 7), (4, 9): (3, 4)}
    for (start, end), tokens in exact.items():
        characters = [Entity(GAME, start, end)]
        assert entities.to_tokens(offsets, characters) == [(GAME, *tokens)]
        assert entities.to_characters(offsets, [(GAME, *tokens)]) == characters
    # Inside of a token, or with a space that has none: all that it touches.
    for (start, end), (first, last) in {(8, 9): (6, 9), (0, 1): (0, 2), (5, 7): (6, 9)}.items():
        tokens = entities.to_tokens(offsets, [Entity(GAME, start, end)])
        assert entities.to_characters(offsets, tokens) == [(GAME, first, last)]
    assert entities.to_tokens(offsets, [Entity(GAME, 5, 5)]) == []


def test_what_is_cut_off_is_no_target():
    split = Split(["在2011的"], [[Entity(NAME, 0, 0), Entity(NAME, 4, 5), Entity(GAME, 5, 5)]])
    settings = type("Settings", (), {"max_length": 4})
    (encoding,), (answer,) = entities.align(WordPieceTokenizer(TOKENS), split, settings)
    assert len(encoding.token_ids) == 4
    assert answer == [(NAME, 1, 1)]


def test_span_lists_and_scores():
    answers = [[Entity(0, 1, 2), Entity(0, 2, 2), Entity(2, 1, 3)], []]
    lists = span_lists(answers, types=3)
    assert lists.shape == (2, 3, 2, 2)
    assert lists[0].tolist() == [[[1, 2], [2, 2]], [[-1, -1]] * 2, [[1, 3], [-1, -1]]]
    assert (lists[1] == -1).all()
    assert span_lists([[]], types=3).shape == (1, 3, 1, 2)
    scores = np.full((2, 3, 4, 4), -1.0)
    scores[1] = np.nan  # of a model that diverged
    for kind, start, end in answers[0]:
        scores[0, kind, start, end] = 0.1
    assert decode(scores) == answers


def test_tags():
    """O, then B and I of each type; of overlapping entities the longest."""
    answer = [
        Entity(0, 1, 2),
        Entity(0, 3, 3),
        Entity(1, 4, 6),
        Entity(1, 5, 5),
        Entity(0, 4, 5),
    ]
    tags = entities_crf.tags_of(answer, length=9)
    assert tags.tolist() == [0, 1, 2, 1, 3, 4, 4, 0, 0]
    assert entities_crf.entities_of(tags.tolist()) == answer[:3]
    # An I that continues nothing of its type, or what such an I says, is outside.
    assert entities_crf.entities_of([2, 2, 1, 4, 4, 2, 3, 2]) == [(0, 2, 2), (1, 6, 6)]
    legal = [(i, j) for i in range(5) for j in range(5) if entities_crf.is_legal(i, j)]
    assert len(legal) == 25 - 6
    assert not {(0, 2), (3, 2), (4, 2), (0, 4), (1, 4), (2, 4)} & set(legal)


def test_outputs_hold_what_loss_and_decoding_need():
    """And tags may reach beyond the batch."""
    draw = np.random.default_rng(0)
    emissions, mask = draw.normal(size=(2, 3, 5)), np.array([[1, 1, 1], [1, 1, 0]], bool)
    layer, crf = entities_crf.Potentials(), CRF()
    for one in (layer, crf):
        one.build((None, None, 5))
    for mine, its in zip(layer.weights, crf.weights, strict=True):
        mine.assign(draw.normal(size=mine.shape))
        its.assign(mine)
    outputs, expected = layer(emissions, mask=mask), crf(emissions, mask=mask)
    assert outputs.shape == (2, 10, 5)
    tags = np.array([[0, 1, 2, 4, 4], [3, 4, 0, 1, 1]])
    loss = entities_crf.TagLoss().call(keras.ops.convert_to_tensor(tags), outputs)
    whole = crf.loss().call(keras.ops.convert_to_tensor(tags[:, :3]), expected)
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (loss, whole)), rtol=1e-6)
    best = keras.ops.convert_to_numpy(crf.decode(expected)).tolist()
    outputs = keras.ops.convert_to_numpy(outputs)
    assert entities_crf.decode(outputs) == [entities_crf.entities_of(row) for row in best]


def test_mean_loss_is_that_of_real_rows():
    loss = MultilabelCrossentropy(class_axes=2, sparse=True)
    random_ = np.random.default_rng(0)
    scores = random_.normal(size=(4, 2, 3, 3)).astype("float32")
    spans = random_.integers(-1, 3, (4, 2, 2, 2))
    rows = keras.ops.convert_to_numpy(loss.call(spans, scores)).mean(axis=1)
    metric = MeanLoss(loss, name="crossentropy")
    metric.update_state(spans, scores, np.ones(4))
    metric.update_state(spans[:2], scores[:2], np.array([1.0, 0]))
    assert float(metric.result()) == pytest.approx((rows.sum() + rows[0]) / 5, rel=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The three official files, self-written: names 李X, games war3."""
    directory, draw = tmp_path_factory.mktemp("cluener"), random.Random(0)

    def lines(count):
        for _ in range(count):
            before, name = "的" * draw.randint(1, 3), "李" + draw.choice("华明")
            text, start = f"{before}{name}在war3赢了", len(before)
            name = {name: [[start, start + 1]]}
            yield {
                "text": text,
                "label": {"name": name, "game": {"war3": [[start + 3, start + 6]]}},
            }

    write_lines(directory / "train.json", lines(24))
    write_lines(directory / "dev.json", lines(10))
    tests = [{"id": i, "text": line["text"]} for i, line in enumerate(lines(5))]
    write_lines(directory / "test.json", tests)
    return directory


@pytest.mark.thorough
@pytest.mark.parametrize("head", ["global_pointer", "crf"])
def test_end_to_end(tiny, tmp_path, head, capsys):
    flags = ["--head", head, "--backend", keras.backend.backend(), *TINY, "--epochs", "1"]
    output = tmp_path / "run"
    assert run.main(["cluener", "--data", str(tiny), "--output", str(output), *flags]) == 0
    assert "dev f1" in capsys.readouterr().out
    result = json.loads((output / "result.json").read_text())
    assert {"loss", "dev_f1", "dev_precision", "dev_recall"} <= result.keys()
    assert 0 < result["loss"] < 100
    data = cluener.load(tiny)
    test = data.tests["cluener_predict.json"]
    read = cluener.FORMAT.read((output / "cluener_predict.json").read_text(encoding="utf-8"))
    assert [id_ for id_, _ in read] == test.ids
    pairs = zip(read, test.inputs, strict=True)
    assert all(cluener.is_answer(answer, text, data) for (_, answer), text in pairs)


@pytest.mark.real_data
def test_the_official_files(shared):
    """Spans equal their surfaces, or `load` would fail."""
    official = cluener.load(shared / "clue" / "cluener")
    assert len(official.labels) == 10
    assert official.labels == sorted(official.labels)
    assert [len(split) for split in official.splits] == [10748, 1343, 1345]
    assert {e.type for answer in official.train.answers for e in answer} == set(range(10))
    tokenizer = WordPieceTokenizer(shared / "vocab" / "chinese" / "vocab.txt")
    settings = type("Settings", (), {"max_length": 128})
    for split, count, inside, overlapping in (
        (official.train, 23971, 11, 3),  # two lie within a third, two share a token
        (official.dev, 3072, 4, 0),
    ):
        encodings, answers = entities.align(tokenizer, split, settings)
        assert sum(map(len, answers)) == sum(map(len, split.answers)) == count
        lost = untagged = 0
        for encoding, answer, given in zip(encodings, answers, split.answers, strict=True):
            lost += len(set(given) - set(entities.to_characters(encoding.offsets, answer)))
            tags = entities_crf.tags_of(answer, 128).tolist()
            untagged += len(set(answer) - set(entities_crf.entities_of(tags)))
        assert (lost, untagged) == (inside, overlapping)
