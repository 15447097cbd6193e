"""Labels out of their range: an error where they can be seen, NaN where they cannot.

Never a loss that looks like one. What a compiled program computes on cannot be seen before it
runs, nor can what lies on an accelerator without waiting for all that it still has to do: so
eager labels in the memory of the host raise a ValueError, others make the loss and its
gradients NaN. The check is one pass over the labels.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_ext.backend import concrete


def check_shape(name: str, tensor: Any, shape: tuple, expected: str = "shape") -> None:
    """Refuse another shape; None, in the one or in the other, is any size.

    Raises:
        ValueError: "`name` must have `expected` `shape`".
    """
    given, shape = tuple(tensor.shape), tuple(shape)
    fits = all(None in (a, b) or a == b for a, b in zip(given, shape, strict=False))
    if len(given) != len(shape) or not fits:
        raise ValueError(f"{name} must have {expected} {shape}, got shape {given}.")


def in_range(name: str, labels: Any, accepted: str, valid: Any, fix: str = "") -> Any:
    """`valid`, a boolean tensor like `labels`; seen to be False somewhere, it is an error.

    Raises:
        ValueError: "`name` must be `accepted`, got" and the labels that are not. `fix`.
    """
    seen = concrete(valid)
    if seen is None or seen.all():
        return valid
    wrong = concrete(labels)
    if wrong is not None:
        wrong = np.unique(wrong[~seen])[:5].tolist()
        raise ValueError(f"{name} must be {accepted}, got {wrong}.{fix}")
    return valid


def nan_unless(valid: Any, losses: Any) -> Any:
    """The losses where `valid` holds, and NaN elsewhere: their gradients too.

    A product, for the gradient of `ops.where` is zero where the NaN is.
    """
    return losses * ops.where(valid, ops.ones_like(losses), float("nan"))


def class_numbers(
    name: str, labels: Any, classes: int, kept: Any = True, fix: str = ""
) -> tuple[Any, Any]:
    """Labels as int32, -1 where they are none of the numbers below `classes`, and where so.

    Args:
        kept: boolean, False where a label does not count, and may be anything.

    Returns: int32 and booleans, both like `labels`.

    Raises:
        ValueError: one that counts can be seen to be out of range; `name` and `fix` are for
            its message.
    """
    numbers = ops.cast(labels, "int32")
    # Fractions and NaN are no class numbers.
    valid = ops.logical_and(ops.equal(ops.cast(numbers, labels.dtype), labels), numbers >= 0)
    valid = ops.logical_and(valid, numbers < classes)
    counts = ops.logical_or(valid, ops.logical_not(kept))
    in_range(name, labels, f"integers in [0, {classes})", counts, fix)
    return ops.where(valid, numbers, -1), counts
