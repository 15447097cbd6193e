"""Fine-tune on a CLUE task, from the official files to the submission files.

    python examples/clue/run.py tnews --data path/to/tnews --model path/to/bert
    python examples/clue/run.py tnews                    # bundled sample, small encoder
    python examples/clue/run.py all --data path/to/clue --model path/to/bert --runs 3

Exit status: 0 done, 1 the machine failed (full disk), 2 a mistake in the call or the data,
130 interrupted. A run that was interrupted goes on by the same command with --resume.
"""

import argparse
import importlib
import os
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from command_line import Parser, exit_status
from configuration import SAMPLE, absolute, default_output, make_config
from download import MIRROR, download
from errors import UserError
from memory import keep_freed
from run_directory import RunDirectory, read_config
from settings import TASKS, Settings, add_flags

BACKENDS = ("tensorflow", "jax", "torch")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""

    def work() -> None:
        given = vars(make_parser().parse_args(argv))
        fetch(given)
        for one_task in tasks(given):
            run_seeds(one_task, several=given["task"] == "all")

    return exit_status(work)


def fetch(given: dict[str, Any]) -> None:
    """What --download asks for."""
    wanted, mirror = given.pop("download"), given.pop("mirror")
    if not wanted:
        return
    if "data" not in given:
        raise UserError("--download needs --data, the directory to unpack into")
    if given["task"] != "all":
        download(given["task"], Path(given["data"]), mirror)
        return
    for task in TASKS:
        download(task, Path(given["data"]) / task, mirror)


def tasks(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The command line, or for "all" one a task: its directories are inside of those given."""
    if given["task"] != "all":
        return [given]
    if "data" not in given:
        raise UserError("all needs --data, the directory that holds tnews, afqmc and so on")
    parents = {name: Path(given[name]) for name in ("data", "output") if name in given}
    absent = [task for task in TASKS if not (parents["data"] / task).is_dir()]
    if absent:
        raise UserError(
            f"{given['data']} lacks {', '.join(absent)}: unpack the official archives there, "
            "or run the other tasks one by one"
        )
    return [
        {**given, "task": task, **{name: path / task for name, path in parents.items()}}
        for task in TASKS
    ]


def run_seeds(given: dict[str, Any], several: bool) -> None:
    """One run, or with --runs a run for every seed.

    Args:
        several: whether this run is one of several, of which --resume continues those that
            were begun.
    """
    runs = given.pop("runs")
    if runs < 1:
        raise UserError(f"runs must be at least 1, got {runs}")
    if runs == 1:
        run_task(given, several)
        return
    first, output = given.get("seed", 0), given.get("output")
    results = []
    for seed in range(first, first + runs):
        place = {} if output is None else {"output": output / f"seed-{seed}"}
        results.append(run_task({**given, "seed": seed, **place}, several=True))
    metric = results[0]["metric"]
    figures = [result[f"dev_{metric}"] for result in results]
    mean, deviation = statistics.mean(figures), statistics.stdev(figures)
    print(f"{given['task']}: dev {metric} {mean:.2%} ± {deviation:.2%} over {runs} seeds")


def run_task(given: dict[str, Any], several: bool = False) -> dict[str, Any]:
    """Check all that needs no Keras, then train; the figures of the best epoch.

    Args:
        given: the command line; flags that were not given are absent.
    """
    given = dict(given)
    output, resume = given.pop("output", None), given.pop("resume")
    stored = read_config(output) if resume and output else None
    config = make_config(given) if stored is None else {**stored, **absolute(given)}
    output = output or default_output(config)
    begun = read_config(output) is not None
    run = RunDirectory(output, config, resume and (begun or not several))
    if run.result is not None:
        print(f"{output} holds this run, finished: {summary(run.result)}")
        return run.result
    task = importlib.import_module(config["task"])
    data = task.load(Path(config["data"]))
    if Path(config["data"]) == SAMPLE / config["task"]:
        print(
            f"no --data given: this is the bundled sample, {len(data.train)} examples written "
            "for this repository; its figures say nothing about CLUE"
        )
    select_backend(config["backend"])
    from finetune import finetune  # imports Keras, so only now that its backend is chosen

    settings = Settings(**{field.name: config[field.name] for field in fields(Settings)})
    finetune(task, config, settings, data, run)
    print(summary(run.result))
    print(f"files in {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    return run.result


def make_parser() -> argparse.ArgumentParser:
    """One flag for what a run reads and writes each, and one for every setting."""
    parser = Parser(__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("task", choices=(*TASKS, "all"))
    add("--data", help="directory of the official files, or of all (default: a bundled sample)")
    add("--download", action="store_true", default=False, help="fetch what --data lacks")
    add("--mirror", default=MIRROR, help="where from (default: %(default)s)")
    add("--model", help="directory of a pretrained BERT: configuration, vocabulary, checkpoint")
    add("--family", help="albert, electra, nezha, ... (default: as the model says, or bert)")
    add("--theseus", metavar="RUN", help="compress the model of a finished run to half of it")
    add("--vocab", help="vocabulary from scratch (default: made from the training texts)")
    add("--cased", action="store_true", help="keep case and accents of a vocab.txt")
    add("--output", type=Path, help="run directory (default: runs/TASK-HASH OF THE FLAGS)")
    add("--runs", type=int, default=1, help="runs, with seeds from --seed on")
    add("--resume", action="store_true", default=False, help="go on with a run that was ended")
    add("--backend", choices=BACKENDS, help="default: KERAS_BACKEND, otherwise tensorflow")
    add("--seed", type=int, help="of weights, dropout and order (default: 0)")
    add("--jit-compile", choices=("auto", "on", "off"), help="XLA (default: auto)")
    add_flags(parser)
    return parser


def select_backend(name: str) -> None:
    """Set the backend of Keras, which is read when Keras is imported, and prepare for it."""
    if "keras" in sys.modules and sys.modules["keras"].backend.backend() != name:
        raise UserError(f"Keras has another backend than {name} already: start a new process")
    os.environ["KERAS_BACKEND"] = name
    keep_freed()
    # Sums in a fixed order: a resumed run ends as an undisturbed one.
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def summary(result: dict[str, Any]) -> str:
    """The best epoch in words."""
    metric = result["metric"]
    return f"dev {metric} {result[f'dev_{metric}']:.2%} at epoch {result['epoch']}"


if __name__ == "__main__":
    sys.exit(main())
