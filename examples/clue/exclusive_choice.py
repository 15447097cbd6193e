"""Multiple choice where the examples of a line share the choices and differ in the answers.

The most probable answers of a line are then an assignment: each example takes another choice,
such that the sum of the logits is the largest (the logarithm of the probability, but for what
does not depend on the answers). Training is that of multiple choice; examples have besides

    line                                equal for examples that share their choices

and follow one another.
"""

from itertools import groupby

import multiple_choice
import numpy as np
from data import Rows, Split, TaskData
from multiple_choice import METRIC, build_model, compile_arguments, decode, encode
from scipy.optimize import linear_sum_assignment

__all__ = [
    "METRIC",
    "assign",
    "build_model",
    "compile_arguments",
    "decode",
    "encode",
    "predictions",
    "score",
]


def score(logits: np.ndarray, split: Split, rows: Rows) -> dict[str, float]:
    """Loss, accuracy of the assignment, and that of each example by itself."""
    alone = multiple_choice.score(logits, split, rows)
    return {
        "loss": alone["loss"],
        "accuracy": float(np.mean(assign(logits, split) == split.answers)),
        "accuracy_argmax": alone["accuracy"],
    }


def predictions(logits: np.ndarray, split: Split, rows: Rows, data: TaskData) -> list:
    """The label of the choice assigned to every example."""
    return [data.labels[index] for index in assign(logits, split)]


def assign(logits: np.ndarray, split: Split) -> np.ndarray:
    """The choice of every example, another one for each example of a line.

    Where a line has more examples than choices, a choice is used as often as it must be.
    """
    logits = np.nan_to_num(logits).astype("float64")  # a diverged run has an accuracy, too
    chosen = []
    for _, examples in groupby(split.inputs, key=lambda example: example.line):
        choices = [len(example.choices) for example in examples]
        count, width = len(choices), choices[0]
        start = len(chosen)
        times = -(-count // width)
        gains = np.tile(logits[start : start + count, :width], times)
        chosen += list(linear_sum_assignment(gains, maximize=True)[1] % width)
    return np.array(chosen)
