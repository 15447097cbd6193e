"""Print the training texts of the CLUE tasks in a directory, each once, a blank line apart.

    python examples/pretraining/clue_text.py path/to/clue > clue.txt

Nothing of dev and test files is among them, unless a training file has it too.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clue"))

from errors import UserError
from settings import TASKS


def texts(directory: Path) -> Iterator[str]:
    """Training texts by task; a task that is absent or cannot be read is told and left out."""
    for task in TASKS:
        try:
            yield from importlib.import_module(task).load(directory / task).train.texts()
        except UserError as error:
            print(f"without {task}: {error}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for text in dict.fromkeys(" ".join(text.split()) for text in texts(Path(sys.argv[1]))):
        print(text, end="\n\n")
