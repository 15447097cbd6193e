"""lm.py and unilm.py: what they predict, and that a run learns and continues texts."""

import json
import sys

import keras
import numpy as np
import pytest
from clue_files import CLUE

sys.path.insert(0, str(CLUE.parent / "pretraining"))

import continue_text
import lm
import objectives
import unilm
from encoder import small_bert

ROWS = np.array([[2, 5, 6, 7, 8, 3], [2, 9, 5, 3, 0, 0]], "int32")
BOTH = ["token_ids", "segment_ids"]


def test_a_language_model_predicts_the_next_token():
    rows = objectives.NextTokens(BOTH)(ROWS, None, None)
    np.testing.assert_array_equal(rows.inputs[0], ROWS)
    assert not rows.inputs[1].any()
    np.testing.assert_array_equal(rows.targets, [[5, 6, 7, 8, 3, 0], [9, 5, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.weights, rows.targets != 0)
    (alone,) = objectives.NextTokens(["token_ids"])(ROWS, None, None).inputs
    np.testing.assert_array_equal(alone, ROWS)


class Prefixes:
    """A generator of numbers that draws these."""

    def __init__(self, *values):
        self.values = values

    def integers(self, low, high):
        assert (low, list(high)) == (1, [6, 4])  # a token before, and one behind
        return np.array(self.values)


def test_a_unilm_predicts_what_is_behind_the_prefix():
    rows = objectives.AfterPrefix(BOTH)(ROWS, None, Prefixes(3, 1))
    np.testing.assert_array_equal(rows.inputs[0], ROWS)
    np.testing.assert_array_equal(rows.inputs[1], [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.weights, [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[5, 6, 7, 8, 3, 0], [9, 5, 3, 0, 0, 0]])


def test_a_model_with_an_encoder_reads_the_prefix_there():
    names = ["token_ids", "decoder_token_ids"]
    rows = objectives.AfterPrefix(names)(ROWS, None, Prefixes(3, 1))
    np.testing.assert_array_equal(rows.inputs[0], [[2, 5, 6, 0, 0, 0], [2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.inputs[1], [[0, 7, 8, 3, 0, 0], [0, 9, 5, 3, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[7, 8, 3, 0, 0, 0], [9, 5, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.weights, rows.targets != 0)


def test_prefixes_leave_something_on_both_sides():
    rng = np.random.default_rng(0)
    many = np.repeat(ROWS, 500, axis=0)
    weights = objectives.AfterPrefix(BOTH)(many, None, rng).weights
    counts = np.bincount(weights[:500].sum(1).astype(int), minlength=6)
    assert counts[0] == 0
    assert (np.abs(counts[1:6] / 500 - 0.2) < 0.09).all()


@pytest.mark.parametrize(
    ("task", "family"),
    [("lm", f) for f in lm.FAMILIES] + [("unilm", f) for f in unilm.FAMILIES],
)
def test_every_family_has_a_model_for_it(task, family):
    sizes = small_bert(12, layers=1, hidden=8, positions=16, dropout=0.0)
    kind = objectives.application(family, task)
    model = objectives.build_model({**sizes, **kind}, family, task)
    assert model.output.shape == (None, None, 12)
    drawn = objectives.make_objective(task, [], model)(ROWS, None, np.random.default_rng(0))
    assert len(drawn.inputs) == len(model.inputs)


@pytest.mark.parametrize(("script", "family"), [(lm, "gpt2"), (unilm, "t5")])
def test_a_run_learns_and_continues(script, family, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("花草花草花草花草\n" * 60, encoding="utf-8")
    command = ["--text", str(tmp_path / "text.txt"), "--family", family, "--hidden", "16"]
    command += ["--length", "16", "--batch-size", "4", "--steps", "240", "--save-every", "120"]
    command += ["--learning-rate", "0.01", "--layers", "1", "--output", str(tmp_path / "run")]
    assert script.main([*command, "--backend", keras.backend.backend()]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["held_out_loss"] for line in lines]
    assert losses[1] < 0.7  # of eight tokens: log 8 = 2.08 at random
    capsys.readouterr()
    model = str(tmp_path / "run" / "model")
    assert continue_text.main([model, "花草花", "--tokens", "5"]) == 0
    assert capsys.readouterr().out == "花草花草花草花草\n"
    other = unilm if script is lm else lm
    flags = ["--resume", "--output", str(tmp_path / "run")]
    assert other.main(flags) == 2
    assert f"is a run of {script.__name__}.py: go on with that" in capsys.readouterr().err
