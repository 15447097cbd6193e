"""The scripts beside the CLUE ones run to their table; their figures are measured by hand."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from clue_files import CLUE

pytestmark = pytest.mark.thorough


def table(*command: str) -> list[str]:
    """The rows of the table that an example prints."""
    environment = os.environ | {"KERAS_BACKEND": keras.backend.backend()}
    done = subprocess.run(
        [sys.executable, str(CLUE.parent / command[0]), *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith("|")][2:]


def test_theseus(monkeypatch):
    """All four models; of their trainings, which TensorFlow traces for seconds, one."""
    monkeypatch.syspath_prepend(CLUE.parent)
    import theseus
    from settings import resolve

    train, trained = theseus.train, []

    def train_one(model, batches, settings, loss=None, *callbacks):
        trained.append((loss, callbacks))
        return train(model, batches, settings, loss, *callbacks) if loss else 0.0

    monkeypatch.setattr(theseus, "train", train_one)
    data = theseus.subset(theseus.tnews.load(theseus.SAMPLE / "tnews"), 64)
    settings = resolve("tnews", "scratch", {"layers": 2, "hidden": 16, "epochs": 2})
    results = list(theseus.experiment(data, settings, settings, seed=0))
    assert [name for name, *_ in results] == ["full", "first half", "distillation", "Theseus"]
    full, *halves = (weights for _, weights, _, _ in results)
    assert halves == [halves[0]] * 3
    assert halves[0] < full
    assert [bool(loss) for loss, _ in trained] == [False, False, True, False, False]
    assert [len(callbacks) for _, callbacks in trained] == [0, 0, 0, 1, 0]
    # The halves begin as the same model, and only one of them was trained.
    assert results[1][2] == results[3][2]


def test_retrieval(tmp_path):
    paragraphs = [
        {
            "context": f"第{i}段",
            "qas": [{"question": f"{word}{i}{i}是什么?"} for word in "甲乙丙丁"],
        }
        for i in range(6)
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    rows = table("retrieval.py", f"--data={file}", "--seeds=1", "--epochs=1")
    assert len(rows) == 6
    assert all(float(cell[:6]) <= 1 for row in rows for cell in row.split(" | ")[1:])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="its alternating step")
def test_gan(tmp_path):
    options = ("--problem=mixture", "--runs=hinge", "--epochs=1", f"--output={tmp_path}")
    assert len(table("gan.py", *options)) == 1


def test_extrapolation(monkeypatch, tmp_path, capsys):
    """The baseline and ReRoPE; of a text of random characters, none is known beforehand."""
    monkeypatch.syspath_prepend(CLUE.parent)
    import extrapolation

    kinds = extrapolation.kinds(3)
    assert list(kinds) == ["RoPE", "log-n", "KeyNorm", "CosA", "HWFA"]
    assert [len(layers) for layers in kinds.values()] == [3] * 5
    monkeypatch.setattr(extrapolation, "kinds", lambda n: {"RoPE": kinds["RoPE"][:n]})
    monkeypatch.setattr(extrapolation, "LENGTHS", (128, 256))
    text = tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("天地玄黄"), 5200)))
    arguments = ["--text", str(text), "--plot", str(tmp_path / "plot.png"), "--seeds", "1"]
    arguments += ["--steps", "2", "--width", "8", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["extrapolation.py", *arguments])
    extrapolation.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert (rows[0], rows[3]) == ("| right | 128 | 256 |", "| nats | 128 | 256 |")
    assert [row.split()[1] for row in rows[1:3]] == ["RoPE", "ReRoPE"]
    for row in rows[4:]:
        losses = np.array(row.split("|")[2:-1], float)
        assert abs(losses - np.log(4)).max() < 0.5
        assert np.ptp(losses) < 0.1  # neither length is harder than the other
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text.write_text("天地玄黄")
    with pytest.raises(SystemExit, match="2"):
        extrapolation.main()
    assert "has 4 characters: give at least 2,816" in capsys.readouterr().err
