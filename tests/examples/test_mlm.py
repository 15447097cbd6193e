"""Masks, packing, and runs: resumed they end as undisturbed ones, and CLUE reads the model."""

import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from clue_files import CLUE

sys.path.insert(0, str(CLUE.parent / "pretraining"))

import mlm
import objectives
import packing
import pretrain
from encoder import small_bert
from masking import MaskedText, WordMasking, places

from keras_ext.models import FAMILIES
from keras_ext.text import WordPieceTokenizer
from keras_ext.text.tokenizer import SPECIAL_TOKENS

VOCABULARY = [*SPECIAL_TOKENS, *"今天气不错好，", "play", "##ing", "##s"]
UNKNOWN, CLS, SEP, MASK = 1, 2, 3, 4


# -------------------------------------------------------------------------------- masks


def random_rows(count, length, seed=0):
    """Rows of ordinary tokens in words of one to four, a special one here and there."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(5, len(VOCABULARY), (count, length)).astype("int32")
    rows[:, 0], rows[:, -1] = CLS, SEP
    rows[rng.random(rows.shape) < 0.02] = UNKNOWN
    starts = rng.random(rows.shape) < 0.6
    starts[:, 1::4] = True
    special = rows < 5
    starts |= special
    starts[:, 1:] |= special[:, :-1]
    return rows, starts


@pytest.fixture(scope="module")
def drawn():
    rows, starts = random_rows(2000, 64)
    return rows, starts, WordMasking(VOCABULARY)(rows, starts, np.random.default_rng(1))


def close_to(share, expected, count):
    """Within five standard deviations of a binomial share."""
    return abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_fifteen_percent_of_the_ordinary_tokens_are_masked(drawn):
    rows, _, masked = drawn
    ordinary = (rows >= 5).sum(axis=1)
    counts = masked.weights.sum(axis=1)
    assert close_to(counts.sum() / ordinary.sum(), 0.15, ordinary.sum())
    # Each row keeps to its budget, but for the word that crosses it.
    assert (np.abs(counts - 0.15 * ordinary) < 4).all()


def test_words_of_any_size_are_masked_equally_often(drawn):
    rows, starts, masked = drawn
    chosen = np.zeros(rows.shape)
    np.put_along_axis(chosen, masked.positions, masked.weights, axis=1)
    words = np.cumsum(starts) - 1
    ordinary = np.bincount(words[(rows >= 5).ravel()], minlength=words[-1] + 1)
    hit = np.bincount(words, chosen.ravel())
    for size in (1, 2, 3, 4):
        of_size = hit[ordinary == size]
        assert set(of_size) == {0, size}  # whole or not at all
        assert close_to(np.mean(of_size > 0), 0.15, len(of_size))


def test_positions_targets_and_what_is_shown_instead(drawn):
    rows, _, masked = drawn
    real = masked.weights > 0
    at = np.arange(len(rows))[:, None], masked.positions
    np.testing.assert_array_equal(masked.targets, rows[at])
    assert all(len(set(row)) == places(64) for row in masked.positions)
    assert (masked.targets[real] >= 5).all()  # special tokens are not predicted
    hidden = np.zeros(rows.shape, bool)
    hidden[at] = real
    np.testing.assert_array_equal(masked.token_ids[~hidden], rows[~hidden])
    shown, targets = masked.token_ids[at][real], masked.targets[real]
    count, ordinary = len(shown), len(VOCABULARY) - 5
    assert ((shown == MASK) | (shown >= 5)).all()
    assert close_to(np.mean(shown == MASK), 0.8, count)
    # A random token is by chance the same as before.
    assert close_to(np.mean(shown == targets), 0.1 + 0.1 / ordinary, count)
    others = np.bincount(shown[(shown != MASK) & (shown != targets)], minlength=5)[5:]
    assert close_to(others.min() / count, 0.1 * (1 - 1 / ordinary) / ordinary, count)


def test_a_word_that_no_row_has_places_for_is_left():
    rows = np.full((200, 64), 5, "int32")
    starts = np.zeros(rows.shape, bool)
    starts[:, 0] = True
    masked = WordMasking(VOCABULARY)(rows, starts, np.random.default_rng(0))
    assert not masked.weights.any()
    np.testing.assert_array_equal(masked.token_ids, rows)


def test_batches_are_drawn_by_seed_epoch_and_step():
    rows, starts = random_rows(10, 16)
    rows[:, 1] = np.arange(10) + 5  # tells the rows apart

    def text(seed=0):
        return MaskedText(rows, starts, WordMasking(VOCABULARY), batch_size=3, seed=seed)

    def equal(one, other):
        return all(map(np.array_equal, one, other))

    first = text()
    steps = [first.draw(step) for step in range(6)]
    again = text()
    for step in (5, 0, 3):  # in any order
        assert equal(again.draw(step), steps[step])
    assert not any(equal(steps[0], other) for other in steps[1:])
    assert not equal(text(seed=1).draw(0), steps[0])
    for epoch in (0, 3):  # no row twice
        batches = [first.rows[first.order[:9]] for _ in [first.draw(epoch)]]
        assert len(np.unique(np.concatenate(batches)[:, 1])) == 9


# ------------------------------------------------------------------------------ packing


def segment(text):
    """Words as in the tests: 今天 天气 不错, and what is between spaces."""
    words = []
    while text:
        known = [w for w in ("今天", "天气", "不错", "playing", "plays") if text.startswith(w)]
        words.append(known[0] if known else text[0])
        text = text[len(words[-1]) :]
    return words


def test_words_start_where_the_segmenter_says_but_not_within_a_piece():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    rows, starts = packing.pack(["今天天气不错", "", "playing好Q", ""], tokenizer, segment, 16)
    assert [tokenizer.id_to_token(i) for i in rows[0]] == [
        *("[CLS]", "今", "天", "天", "气", "不", "错", "[SEP]"),
        *("play", "##ing", "好", "[UNK]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"),
    ]
    expected = [1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(starts, [np.array(expected, bool)])
    _, letters = packing.pack(["playing", ""], tokenizer, list, 8)
    assert not letters[0, 2]  # "##ing", though the letter before is a word


@pytest.mark.parametrize("count", [6, 11, 12, 13])
def test_packing_loses_no_token_and_pads_the_last_row_only(count):
    tokenizer = WordPieceTokenizer(VOCABULARY)
    text = ("今天气不错好，" * 3)[:count]
    rows, starts = packing.pack([text[:4], text[4:], ""], tokenizer, list, 8)
    assert len(rows) == -(-count // 6)
    assert (rows[:, 0] == CLS).all()
    assert (np.sum(rows == SEP, axis=1) == 1).all()
    assert (rows[:-1] > 0).all()
    kept = rows[(rows != CLS) & (rows != SEP) & (rows != 0)]
    assert "".join(map(tokenizer.id_to_token, kept)) == text
    assert starts.all()


def test_lines_of_files_and_directories(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("\n\n 三 \r\n\n\n四\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeff一\n二", encoding="utf-8")
    lines = packing.read_lines([str(tmp_path / "a.txt"), str(tmp_path / "more")])
    assert lines == ["一", "二", "", "三", "", "四", ""]


# -------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run of seconds: an epoch and a half, with dropout, saved three times."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("花草树木" * 300, encoding="utf-8")
    flags = "--length 16 --layers 1 --hidden 16 --batch-size 8 --steps 15 --save-every 5"
    flags += f" --learning-rate 0.02 --dropout 0.1 --backend {keras.backend.backend()}"
    return ["--text", str(path), *flags.split()]


@pytest.fixture
def by_characters(monkeypatch):
    """The tests need no jieba."""
    monkeypatch.setattr(pretrain, "import_segmenter", lambda: list)


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory):
    """The directory of a run, and what a kill before the second state left of the same."""
    whole, killed = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "killed"))
    save = pretrain.save_transformer_model

    def save_and_copy(model, *arguments):
        save(model, *arguments)
        if int(model.optimizer.iterations) == 10:
            shutil.copytree(whole, killed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "import_segmenter", lambda: list)
        patch.setattr(pretrain, "save_transformer_model", save_and_copy)
        assert mlm.main([*command, "--output", str(whole)]) == 0
    return whole, killed


def figures(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "steps_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def test_files_of_a_run(runs, command, capsys):
    whole, _ = runs
    names = "config.json learning_curve.png metrics.jsonl model result.json state.npz vocab.txt"
    assert sorted(path.name for path in whole.iterdir()) == names.split()
    assert (whole / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    history = figures(whole)
    assert [line["step"] for line in history] == [5, 10, 15]
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]
    assert mlm.main([*command, "--output", str(whole)]) == 0
    assert "holds this run, finished: held out: loss " in capsys.readouterr().out


def test_a_resumed_run_ends_as_an_undisturbed_one(runs, command, tmp_path, capsys):
    whole, killed = runs[0], shutil.copytree(runs[1], tmp_path / "killed")
    assert figures(killed) == figures(whole)[:1]
    assert mlm.main([*command, "--output", str(killed)]) == 2
    assert "unfinished: continue it by --resume" in capsys.readouterr().err
    # The text is not read again: nothing here replaces jieba.
    assert mlm.main(["--resume", "--output", str(killed)]) == 0
    assert "continuing after step 5" in capsys.readouterr().out
    assert figures(killed) == figures(whole)
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (killed / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_the_script_goes_on_in_a_process_of_its_own(runs, tmp_path):
    """No file beside the scripts has the name of a module that a backend imports."""
    killed = shutil.copytree(runs[1], tmp_path / "killed")
    command = [sys.executable, mlm.__file__, "--resume", "--output", str(killed)]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert [line["step"] for line in figures(killed)] == [5, 10, 15]


@pytest.mark.parametrize("family", mlm.FAMILIES)
def test_every_family_predicts_the_tokens_masked(family):
    """What `with_mlm` gives at all positions, at those asked for."""
    sizes = small_bert(len(VOCABULARY), layers=2, hidden=8, positions=16, dropout=0.0)
    model = objectives.build_model(sizes, family, "mlm")
    whole = FAMILIES[family].from_config(sizes).build(with_mlm=True)
    whole.set_weights(model.get_weights())
    rng = np.random.default_rng(0)
    token_ids = rng.integers(5, len(VOCABULARY), (3, 16))
    positions = rng.integers(0, 16, (3, places(16)))
    logits = whole([token_ids, 0 * token_ids])[1]
    expected = np.take_along_axis(
        keras.ops.convert_to_numpy(logits), positions[:, :, None], axis=1
    )
    predicted = model([token_ids, 0 * token_ids, positions])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(predicted), expected, atol=1e-5)


def test_clue_reads_the_model(runs):
    import encoder
    from settings import Settings

    model = {"model": str(runs[0] / "model"), "family": None, "cased": False}
    tokenizer, trunk = encoder.build(model, Settings(max_length=16), None)
    assert not trunk.checkpoint_report.fresh
    ids = np.array([tokenizer.encode("花草").token_ids])
    assert trunk([ids, np.zeros_like(ids)]).shape == (1, 4, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text"], "expected at least one argument"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--warmup", "nan"], "warmup must be at least 0 and less than 1, got nan"),
        (["--text", "absent.txt"], "absent.txt is missing"),
        (["--batch-size", "100"], "no batch: give more text, or a smaller"),
        (["--hidden", "200"], "hidden_size=200 must be a multiple"),
        (["--vocab", "absent"], "absent"),
    ],
)
@pytest.mark.usefixtures("by_characters")
def test_mistakes_are_told_in_one_line(flags, message, command, tmp_path, capsys):
    assert mlm.main([*command, "--output", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_without_text_or_jieba(command, tmp_path, monkeypatch, capsys):
    assert mlm.main(["--output", str(tmp_path / "run")]) == 2
    assert "give the text to train on by --text" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert mlm.main([*command, "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'keras-ext[pretraining]'" in capsys.readouterr().err
