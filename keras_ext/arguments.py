"""Checks of arguments, with errors that name the argument, the value and what is accepted.

Numbers of NumPy count as numbers; `True` and `False` do not. What is returned is Python's own
type, as configurations are saved with.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, least: int = 1) -> int:
    """The value as an `int`, if it is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
    return int(value)


def number(name: str, value: Any, interval: str) -> float:
    """The value as a `float`, if it is a number in the interval.

    Args:
        interval: such as "(0, 1]" or "[0, inf)": a bracket includes the limit, a parenthesis
            excludes it.
    """
    low, high = map(float, interval[1:-1].split(","))
    if isinstance(value, Real) and not isinstance(value, bool):
        found = float(value)
        above = low <= found if interval[0] == "[" else low < found
        below = found <= high if interval[-1] == "]" else found < high
        if above and below:  # not for NaN
            return found
    accepted = f"in {interval}"
    if math.isinf(high):
        accepted = f"{'>=' if interval[0] == '[' else '>'} {low:g}"
    raise ValueError(f"{name} must be a number {accepted}, got {value!r}.")


def choice(name: str, value: Any, options: Sequence[str]) -> Any:
    """The value, if it is one of the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {value!r}.")
    return value


def learning_rate(value: Any) -> Any:
    """A number as a `float`, the type that Keras takes; schedules and callables as they are."""
    return number("learning_rate", value, "(-inf, inf)") if isinstance(value, Real) else value
