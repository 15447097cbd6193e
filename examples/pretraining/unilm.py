"""Pretrain a small model to continue prefixes of plain text, which it reads as a whole.

    python examples/pretraining/unilm.py --text corpus.txt more/ --output runs/unilm
    python examples/pretraining/continue_text.py runs/unilm/model 今天天气

A row of text is cut somewhere. What is before is read in both directions: by a UniLM as segment
0 of one text, by a T5 in its encoder; each token behind it is predicted from all before it.

Exit status: 0 done, 1 the machine failed (full disk), 2 a mistake in the call or the text,
130 interrupted. A run that was interrupted goes on by the same command with --resume.

Source: Dong et al. 2019 (UniLM), arXiv 1905.03197; Raffel et al. 2020 (T5), arXiv 1910.10683,
section 3.2.3 (prefix language model).
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
    "gau_alpha",
    "nezha",
    "roformer",
    "roformer_v2",
    "t5",
    "mt5",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run_task("unilm", FAMILIES, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
