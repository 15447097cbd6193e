"""What the losses of this package share: means in float64, where they are asked for."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ext import backend


class _Sum(keras.losses.Loss):
    """The sum of what a function returns, weighted and masked as by Keras."""

    def __init__(self, fn: Callable[[Any, Any], Any]) -> None:
        super().__init__(reduction="sum", dtype="float64")
        self.fn = fn

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.fn(y_true, y_pred)


class Loss(keras.losses.Loss):
    """A `keras.losses.Loss` that is in float64 if its dtype is.

    Keras divides by the number of values, or by the sum of their weights, in float32 on
    PyTorch and JAX.
    """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if self.dtype != "float64" or self.reduction in (None, "none", "sum"):
            return super().__call__(y_true, y_pred, sample_weight)
        each: list[Any] = []

        def call(y_true: Any, y_pred: Any) -> Any:
            each.append(self.call(y_true, y_pred))
            return each[0]

        total = _Sum(call)(y_true, y_pred, sample_weight)
        weights = sample_weight if self.reduction == "mean_with_sample_weight" else None
        number = _Sum(lambda *_: ops.ones_like(each[0]))(y_true, y_pred, weights)
        nothing = ops.equal(number, 0)
        mean = ops.where(nothing, 0 * total, total / ops.where(nothing, 1, number))
        return mean / backend.num_replicas()
