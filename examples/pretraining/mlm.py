"""Pretrain a small BERT, or relative, on plain text: whole-word masked language modelling.

    python examples/pretraining/mlm.py --text corpus.txt more/ --output runs/bert
    python examples/clue/run.py tnews --data path/to/tnews --model runs/bert/model

Exit status: 0 done, 1 the machine failed (full disk), 2 a mistake in the call or the text,
130 interrupted. A run that was interrupted goes on by the same command with --resume.
"""

import sys
from pathlib import Path

# What CLUE's scripts have already: run directories, schedules, one-line errors.
root = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(root), str(root / "examples" / "clue"), str(root / "examples/pretraining")]

from pretraining_command import run_task

FAMILIES = (
    "bert",
    "albert",
    "electra_generator",
    "gau_alpha",
    "nezha",
    "roformer",
    "roformer_v2",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run_task("mlm", FAMILIES, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
