"""The command line that mlm.py, lm.py and unilm.py share."""

import argparse
import os
from pathlib import Path
from typing import Any

from command_line import Parser, exit_status
from configuration import default_output
from errors import UserError
from run import BACKENDS, select_backend
from run_directory import RunDirectory, read_config

# Flag -> default, the least that is allowed, help.
FLAGS: dict[str, tuple[Any, float, str]] = {
    "vocab_size": (20_000, 6, "tokens of a vocabulary made from the text, at most"),
    "length": (128, 8, "tokens of a row: the longest input of the model"),
    "layers": (2, 1, "layers"),
    "hidden": (128, 1, "width"),
    "dropout": (0.0, 0, "dropout rate; small models underfit without any"),
    "batch_size": (32, 1, "rows of a step"),
    "steps": (10_000, 1, "steps of training"),
    "learning_rate": (1e-3, 0, "highest learning rate"),
    "warmup": (0.05, 0, "part of the steps in which the rate rises; then it falls to zero"),
    "weight_decay": (0.01, 0, "decoupled decay of kernels and embeddings"),
    "held_out": (0.01, 0, "part of the rows that is only scored"),
    "save_every": (1000, 1, "steps from one scoring and saving to the next"),
    "seed": (0, 0, "of weights, order and masks"),
}
PARTS = ("dropout", "warmup", "held_out")


def run_task(
    task: str, families: tuple[str, ...], description: str, argv: list[str] | None
) -> int:
    """Run the command line of a task; the exit status.

    Args:
        task: "mlm", "lm" or "unilm".
        families: of models that can learn it, the default first.
        description: docstring of the script.
        argv: the command line. Default: that of the process.
    """

    def run() -> None:
        pretrain(task, families[0], vars(make_parser(description, families).parse_args(argv)))

    return exit_status(run, "pretraining")


def pretrain(task: str, family: str, given: dict[str, Any]) -> None:
    """Check all that needs no Keras, then train.

    Args:
        task: what is learnt.
        family: the default.
        given: the command line; flags that were not given are absent.
    """
    output, resume = given.pop("output", None), given.pop("resume")
    stored = read_config(output) if resume and output else None
    config = make_config({"task": task, "family": family, **(stored or {})}, given)
    if config["task"] != task:
        raise UserError(f"{output} is a run of {config['task']}.py: go on with that")
    output = output or default_output(config)
    run = RunDirectory(output, config, resume)
    if run.result is not None:
        print(f"{output} holds this run, finished: {summary(run.result)}")
        return
    select_backend(config["backend"])
    from pretrain import pretrain  # imports Keras, so only now that its backend is chosen

    pretrain(config, run)
    print(f"{summary(run.result)}; the model is in {output / 'model'}")


def make_config(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """All that determines a run: defaults, what the run had, and what was given."""
    config = {
        "text": [],
        "vocab": None,
        "backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "jit_compile": "auto",
        **{name: default for name, (default, _, _) in FLAGS.items()},
        **stored,
        **given,
    }
    if not config["text"]:
        raise UserError("give the text to train on by --text")
    # Absolute, as a run may be resumed from another directory.
    config["text"] = [str(Path(path).resolve()) for path in config["text"]]
    config["vocab"] = config["vocab"] and str(Path(config["vocab"]).resolve())
    for name, (_, least, _) in FLAGS.items():
        if not least <= config[name] < (1 if name in PARTS else float("inf")):
            upper = " and less than 1" if name in PARTS else ""
            raise UserError(f"{name} must be at least {least}{upper}, got {config[name]}")
    return config


def make_parser(description: str, families: tuple[str, ...]) -> argparse.ArgumentParser:
    """What a run reads and writes, and a flag for every setting."""
    parser = Parser(description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--text", nargs="+", metavar="PATH", help="UTF-8 files and directories of them")
    add("--vocab", help="vocabulary, a token a line (default: made from the text)")
    add("--family", choices=families, help=f"of models (default: {families[0]})")
    add("--output", type=Path, help="run directory (default: runs/TASK-HASH OF THE FLAGS)")
    add("--resume", action="store_true", default=False, help="go on with a run that was ended")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, otherwise tensorflow")
    add("--jit-compile", choices=("auto", "on", "off"), help="XLA (default: auto)")
    for name, (default, _, text) in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(default), help=f"{text} (default: {default})")
    return parser


def summary(result: dict[str, Any]) -> str:
    """The last figures in words."""
    return (
        f"held out: loss {result['held_out_loss']:.4f}, accuracy "
        f"{result['held_out_accuracy']:.2%} after {result['step']:,} steps"
    )
