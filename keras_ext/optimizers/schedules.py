"""Learning rate schedules: functions of the number of updates made so far (0 at the first).

Wrappers of this package leave that number to the inner optimizer, so under accumulation the
steps of a schedule are updates, not micro-batches.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import keras
from keras import ops

__all__ = ["InverseSquareRoot", "PiecewiseLinear"]


@keras.saving.register_keras_serializable(package="keras_ext")
class PiecewiseLinear(keras.optimizers.schedules.LearningRateSchedule):
    """Straight lines between given points; constant before the first and after the last.

        learning_rate * (m_i (s_j - step) + m_j (step - s_i)) / (s_j - s_i),  s_i <= step <= s_j

    Warm-up and decay are both points: {0: 0, 1000: 1, 10000: 0.1} rises to the full learning
    rate in 1000 updates and has fallen to a tenth of it after 10000. The first update has
    step 0, so with {0: 0} it does not move. Unlike bert4keras's schedule, which adds a point
    {0: 0} of its own, this one starts with the first multiplier it is given.

    Exact at the points; between them to a few float32 roundings of the rate itself, however
    large the steps (of the larger of the two rates, if their signs differ).

    Args:
        points: {step: multiplier}, at least one; integer steps >= 0, in updates, in any order.
        learning_rate: what the multipliers multiply; default 1, then they are the rates.

    Raises:
        ValueError: no points, a step that is no integer >= 0, or a number that is not finite.

    Example:
        >>> rate = schedules.PiecewiseLinear({0: 0, 1000: 1, 10000: 0.1}, learning_rate=1e-3)
        >>> round(float(rate(500)), 6)
        0.0005
        >>> model.compile(keras.optimizers.Adam(rate), loss="mse")

    Reference: kexue.fm/archives/7094.
    """

    def __init__(self, points: Mapping[int, float], learning_rate: float = 1.0):
        super().__init__()
        if not isinstance(points, Mapping) or not points:
            raise ValueError(
                f"points must be a non-empty dictionary {{step: multiplier}}, got {points!r}."
            )
        for step, multiplier in points.items():
            if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
                raise ValueError(f"points must have integer steps >= 0, got the step {step!r}.")
            if not _is_finite(multiplier):
                raise ValueError(
                    f"points must have finite multipliers, got {multiplier!r} at step {step}."
                )
        if not _is_finite(learning_rate):
            raise ValueError(f"learning_rate must be a finite number, got {learning_rate!r}.")
        self.points = {int(step): float(points[step]) for step in sorted(points)}
        self.learning_rate = float(learning_rate)

    def __call__(self, step: Any) -> Any:
        step = ops.convert_to_tensor(step)
        rates = [(s, self.learning_rate * multiplier) for s, multiplier in self.points.items()]
        rate = ops.convert_to_tensor(rates[0][1], "float32")
        # Both distances are taken from integers: where a line ends near zero, 1 - (share done)
        # would keep only the digits of 1.
        for (start, low), (end, high) in pairwise(rates):
            done = ops.cast(step - start, "float32") / (end - start)
            left = ops.cast(end - step, "float32") / (end - start)
            rate = ops.where(step >= start, low * left + high * done, rate)
        last, final = rates[-1]
        return ops.where(step >= last, ops.convert_to_tensor(final, "float32"), rate)

    def get_config(self) -> dict[str, Any]:
        # Pairs: in JSON the keys of a dictionary become strings.
        return {
            "points": [[step, multiplier] for step, multiplier in self.points.items()],
            "learning_rate": self.learning_rate,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**(config | {"points": dict(map(tuple, config["points"]))}))


@keras.saving.register_keras_serializable(package="keras_ext")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """min(maximum, 1 / sqrt(t)) at update t = 1, 2, ...: the schedule of Adafactor and T5.

    With the default it is constant for 10000 updates.

    Args:
        maximum: upper limit > 0 of the learning rate.

    Raises:
        ValueError: maximum is not a finite number > 0.

    Example:
        >>> model.compile(keras.optimizers.Adam(schedules.InverseSquareRoot(1e-3)), loss="mse")

    Reference: Shazeer and Stern 2018, arXiv 1804.04235 (there rho_t).
    """

    def __init__(self, maximum: float = 1e-2):
        super().__init__()
        if not _is_finite(maximum) or maximum <= 0:
            raise ValueError(f"maximum must be a finite number > 0, got {maximum!r}.")
        self.maximum = float(maximum)

    def __call__(self, step: Any) -> Any:
        t = ops.cast(ops.convert_to_tensor(step) + 1, "float32")
        return ops.minimum(self.maximum, ops.rsqrt(t))

    def get_config(self) -> dict[str, Any]:
        return {"maximum": self.maximum}


def _is_finite(number: Any) -> bool:
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    return is_number and math.isfinite(number)
