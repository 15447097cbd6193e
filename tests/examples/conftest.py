"""The scripts import each other by their bare names, as `python examples/clue/run.py` does."""

import os
import sys
from unittest import mock

import keras
import pytest
from clue_files import CLUE, LABELS, TINY, sentences, start, write_lines

sys.path.insert(0, str(CLUE))


@pytest.fixture(scope="session")
def tiny_tnews(tmp_path_factory):
    """A directory of the five official files, self-written."""
    directory = tmp_path_factory.mktemp("tnews")
    write_lines(directory / "train.json", sentences(50, seed=0))
    write_lines(directory / "dev.json", sentences(21, seed=1))
    labels = [{"label": label, "label_desc": f"news_{label}"} for label in LABELS]
    write_lines(directory / "labels.json", labels)
    for name, first, seed in (("test.json", 0, 2), ("test1.0.json", 100, 3)):
        tests = [
            {"id": first + index, "sentence": line["sentence"], "keywords": ""}
            for index, line in enumerate(sentences(11, seed=seed))
        ]
        write_lines(directory / name, tests[::-1])  # ids need not rise
    return directory


@pytest.fixture(scope="session")
def command(tiny_tnews):
    """Arguments of a run that takes seconds, on the backend of the tests."""
    backend = keras.backend.backend()
    return ["tnews", "--data", str(tiny_tnews), "--backend", backend, *TINY]


@pytest.fixture(scope="session")
def finished_run(command, tmp_path_factory):
    """The directory of a run that went through undisturbed."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    with start(*command, "--output", str(output)) as process:
        assert process.wait() == 0
    return output


@pytest.fixture(autouse=True)
def environment():
    """What run.py sets for its process ends with the test, and is not to reach TensorFlow.

    Keras loads no model for XLA where TensorFlow is deterministic, which it then stays.
    """
    with mock.patch.dict(os.environ, {"TF_DETERMINISTIC_OPS": "0"}):
        yield
