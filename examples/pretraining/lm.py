"""Pretrain a small language model on plain text: each token from those before it.

    python examples/pretraining/lm.py --text corpus.txt more/ --output runs/gpt2
    python examples/pretraining/continue_text.py runs/gpt2/model 今天天气

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
    "gpt2",
    "openai-gpt",
    "gpt2_ml",
    "bert",
    "albert",
    "gau_alpha",
    "nezha",
    "roformer",
    "roformer_v2",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run_task("lm", FAMILIES, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
