"""Small self-written files in the format of TNEWS, and flags of a run that takes seconds."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

CLUE = Path(__file__).parents[2] / "examples" / "clue"

LABELS = ["100", "104", "116"]
WORDS = {"100": "花草树木", "104": "股市基金", "116": "游戏手柄"}
TINY = ["--layers", "1", "--hidden", "16", "--epochs", "2", "--batch-size", "8"]


def write_lines(path, entries):
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences(count, seed):
    """Lines of 2 to 6 characters, so of one bucket length, that tell their label."""
    draw = random.Random(seed)
    for _ in range(count):
        label = draw.choice(LABELS)
        text = "".join(draw.choices(WORDS[label] + "，好的", k=draw.randint(2, 6)))
        yield {"label": label, "label_desc": f"news_{label}", "sentence": text, "keywords": ""}


def check_damage(load, directory, rounds=60):
    """Any file cut, reordered or overwritten anywhere is read, or refused in one line.

    Args:
        load: reads the files of `directory`; of what it raises only a UserError is right.
    """
    from errors import UserError  # of the scripts, which conftest.py puts on the path

    paths, draw = sorted(directory.iterdir()), random.Random(directory.name)
    kinds = (
        lambda raw, at: raw[:at],
        lambda raw, at: raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :],
        lambda raw, at: raw[:at] + raw[at + 1 :],
        lambda raw, at: raw[at:] + raw[:at],
    )
    refused = 0
    for _ in range(rounds):
        path, damage = draw.choice(paths), draw.choice(kinds)
        raw = path.read_bytes()
        path.write_bytes(damage(raw, draw.randrange(len(raw))))
        message = ""
        try:
            load(directory)
        except UserError as error:
            message = str(error)
        if message:
            refused += 1
            assert path.stem in message
            assert "\n" not in message
        path.write_bytes(raw)
    assert refused


def start(*arguments):
    """run.py in a process of its own, with its output thrown away.

    What is to be equal bit by bit must run so: TensorFlow heeds `TF_DETERMINISTIC_OPS` only if
    it is set before the first operation of a process.
    """
    environment = {**os.environ, "PYTHONPATH": str(CLUE.parents[1])}
    environment.pop("TF_DETERMINISTIC_OPS", None)  # run.py sets it
    command = [sys.executable, str(CLUE / "run.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
