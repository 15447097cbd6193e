"""One directory a run: its configuration, its state, its results; never a half-written file.

config.json             what was asked for; another configuration is refused
vocab.txt               the vocabulary used
state.npz               everything a killed run needs to go on
metrics.jsonl           one line an epoch
learning_curve.png
best.weights.h5         weights of the best epoch on dev
successor.weights.h5    with --theseus: the smaller model alone
*_predict.json          submission files
result.json             written last: the run is finished
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all is written, and vanishes otherwise."""
    partial = path.with_name(f"partial-{path.name}")  # keeps the suffix, which Keras reads
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class RunDirectory:
    """The files of one run.

    Args:
        path: the directory; it need not exist.
        config: the configuration of the run, as JSON can hold it.
        resume: whether the run may continue what is there.

    Raises:
        UserError: the directory holds something else, the same run unfinished and
            `resume` is False, or nothing to resume.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool):
        self.path, self.config = path, config
        self._check(resume)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None."""
        file = self / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def create(self, vocabulary: list[str]) -> None:
        """Make the directory and write what is known before training."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_text("vocab.txt", "".join(f"{token}\n" for token in vocabulary))
        self.write_json("config.json", self.config)

    def write_text(self, name: str, text: str) -> None:
        with replacing(self / name) as partial:
            partial.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _check(self, resume: bool) -> None:
        stored = read_config(self.path)
        if stored is None:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(
                    f"{self.path} exists and is no run directory: give a new one by --output."
                )
            if resume:
                raise UserError(
                    f"{self.path} holds no run to resume: leave out --resume, "
                    "or name the directory of the run by --output."
                )
        elif stored != self.config:
            raise UserError(
                f"{self.path} holds a run with another configuration "
                f"({_differences(stored, self.config)}): give another directory by --output."
            )
        elif not resume and self.result is None:
            raise UserError(
                f"{self.path} holds this run, unfinished: continue it by --resume, "
                "or give another directory by --output."
            )


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory, or None where there is none."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(
            f"{path / 'config.json'} is no configuration of a run: "
            "give another directory by --output."
        ) from None


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    keys = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    return ", ".join(f"{key} {there.get(key)} there, {here.get(key)} here" for key in keys)
