"""Check the predictions of finished runs against the official test files, and pack them.

    python examples/clue/submit.py runs/tnews-1a2b3c4d runs/afqmc-5e6f7a8b --output submit.zip

Every submission file of the runs is held against its test file: all ids, each once, in the
order of the test, and answers that the task knows. Versions 1.0 and 1.1 of the leaderboard
have files of their own names and go into the same archive. Nothing is written unless all is
well. Exit status: 0 done, 2 something does not fit.
"""

import importlib
import sys
import zipfile
from pathlib import Path
from typing import Any

from command_line import Parser, exit_status
from data import Split, TaskData
from errors import UserError
from run_directory import read_config, replacing


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--output", type=Path, default=Path("submit.zip"))

    def work() -> None:
        arguments = parser.parse_args(argv)
        files: dict[str, tuple[Path, str]] = {}
        for directory in arguments.runs:
            for name, text in checked_files(directory).items():
                if name in files:
                    raise UserError(
                        f"{directory} and {files[name][0]} both have {name}: give one each"
                    )
                files[name] = directory, text
        with replacing(arguments.output) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, (_, text) in sorted(files.items()):
                archive.writestr(name, text, zipfile.ZIP_DEFLATED)
        print(f"{arguments.output}: {', '.join(sorted(files))}")

    return exit_status(work, resumable=False)


def checked_files(directory: Path) -> dict[str, str]:
    """The submission files of a run, by name."""
    config = read_config(directory)
    if config is None or not (directory / "result.json").exists():
        raise UserError(f"{directory} is not the directory of a finished run: run run.py first")
    task = importlib.import_module(config["task"])
    data = task.load(Path(config["data"]))
    files = {}
    for name, test in data.tests.items():
        try:
            files[name] = (directory / name).read_text(encoding="utf-8")
            check(files[name], test, data, task)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{directory / name}: {error}: run run.py again") from None
    return files


def check(text: str, test: Split, data: TaskData, task: Any) -> None:
    """A ValueError, if the text is not a valid submission for the test."""
    entries = task.FORMAT.read(text)
    ids = [id_ for id_, _ in entries]
    if ids != test.ids:
        if len(ids) != len(test.ids):
            raise ValueError(f"{len(ids)} answers to {len(test.ids)} examples")
        place = next(
            i for i, pair in enumerate(zip(ids, test.ids, strict=True)) if len({*pair}) > 1
        )
        raise ValueError(
            f"answer {place + 1} has the id {ids[place]!r}, not {test.ids[place]!r}"
        )
    for (id_, answer), inputs in zip(entries, test.inputs, strict=True):
        if not task.is_answer(answer, inputs, data):
            raise ValueError(f"{answer!r} is no answer to the example {id_}")


if __name__ == "__main__":
    sys.exit(main())
