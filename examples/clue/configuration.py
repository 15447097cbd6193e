"""What determines a run, all of it: the flags given, and the defaults that complete them."""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from errors import UserError
from run_directory import read_config
from settings import Settings, resolve

SAMPLE = Path(__file__).resolve().parent / "sample"
PATHS = ("data", "model", "vocab", "theseus")

# What a compressed model has from the one it comes from.
THE_TEACHERS = (
    "model",
    "family",
    "vocab",
    "cased",
    "layers",
    "hidden",
    "head",
    "pooling",
    "max_length",
)


def make_config(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, completed by the defaults."""
    if "theseus" in given:
        return {**_config_of_teacher(given), **absolute(given)}
    task, model = given["task"], given.get("model")
    scratch_only = [name for name in ("vocab", "layers", "hidden") if name in given]
    if model and scratch_only:
        raise UserError(
            f"--{scratch_only[0]} is for encoders from scratch: leave out that or --model"
        )
    start = "pretrained" if model else "scratch" if "data" in given else "sample"
    if "data" not in given and not (SAMPLE / task).is_dir():
        raise UserError(f"{task} has no bundled sample: give the official files by --data")
    defaults = {
        "data": str(SAMPLE / task),
        "model": None,
        "family": None,
        "vocab": None,
        "cased": False,
        "theseus": None,
        "backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "seed": 0,
        "jit_compile": "auto",
    }
    names = {field.name for field in fields(Settings)}
    settings = resolve(task, start, {name: given[name] for name in names & given.keys()})
    return {**defaults, **asdict(settings), **absolute(given)}


def absolute(given: dict[str, Any]) -> dict[str, Any]:
    """The same with absolute paths: a run may be resumed from another directory."""
    return {
        **given,
        **{name: str(Path(given[name]).resolve()) for name in PATHS if name in given},
    }


def default_output(config: dict[str, Any]) -> Path:
    """The same configuration gives the same directory, so that it can be resumed."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{config['task']}-{digest[:8]}"


def _config_of_teacher(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run named by --theseus, with the vocabulary that it used."""
    teacher = Path(given["theseus"]).resolve()
    config = read_config(teacher)
    if config is None or not (teacher / "result.json").is_file():
        raise UserError(f"{teacher} holds no finished run: give the directory of one")
    if config["task"] != given["task"]:
        raise UserError(f"{teacher} is a run of {config['task']}, not of {given['task']}")
    if config["theseus"]:
        raise UserError(f"{teacher} is compressed itself: give a run without --theseus")
    fixed = [name for name in THE_TEACHERS if name in given]
    if fixed:
        raise UserError(
            f"--{fixed[0].replace('_', '-')} is that of the run in {teacher}: leave it out"
        )
    vocabulary = None if config["model"] else str(teacher / "vocab.txt")
    return {**config, "vocab": vocabulary}
