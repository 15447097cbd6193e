"""Evaluate with the averaged weights, go on training with the others.

The weights are exchanged for their averages when an evaluation or a prediction begins and come
back when it ends, bit for bit: they are put aside, not recomputed. Cost: a copy of the weights
while it lasts.

`keras.callbacks.SwapEMAWeights` does this for `use_ema=True`. On TensorFlow it swaps by adding
and subtracting, which rounds; after `predict` it leaves the averages in the model; and it
looks for the optimizer one level deep.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers import nesting
from keras_ext.optimizers.ema import EMAOptimizer


class EvaluateWithEMA(keras.callbacks.Callback):
    """Validation in `fit`, `evaluate` and `predict` see the averages of an `EMAOptimizer`.

    Pass it in `callbacks=[...]` of the call that it should act in. The `EMAOptimizer` may
    stand anywhere in the chain of wrappers.

    A checkpoint that `ModelCheckpoint` saves in `fit` holds the trained weights and, in the
    state of the optimizer, the averages that the validation saw. To use these, load the model
    and call `assign_averages` of its `EMAOptimizer`.

    An evaluation that raised, or was interrupted, has left the averages in the model: `restore`
    puts the weights back, and the next evaluation with the same callback does so first.

    Raises:
        ValueError: when `fit`, `evaluate` or `predict` begins, if the model was compiled
            without an `EMAOptimizer`.

    Example:
        >>> model.compile(EMAOptimizer("adam", momentum=0.99), loss="mse")
        >>> history = model.fit(x, y, validation_data=(x, y), verbose=0,
        ...                     callbacks=[EvaluateWithEMA()])
        >>> loss = model.evaluate(x, y, verbose=0, callbacks=[EvaluateWithEMA()])
    """

    def __init__(self) -> None:
        super().__init__()
        self._put_aside: tuple | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._optimizer()  # no EMAOptimizer: say so before an epoch has passed

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._exchange()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self.restore()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._exchange()

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        self.restore()

    def _exchange(self) -> None:
        self.restore()
        optimizer = self._optimizer()
        if optimizer.built and _updates(optimizer) > 0:
            weights = optimizer.inner_variables
            self._put_aside = weights, backend.snapshot(weights), _updates(optimizer)
            optimizer.assign_averages()

    def restore(self) -> None:
        """Put the weights back, unless they have been trained since they were put aside."""
        if self._put_aside is not None:
            weights, values, updates = self._put_aside
            self._put_aside = None
            if _updates(self._optimizer()) == updates:
                for weight, value in zip(weights, values, strict=True):
                    weight.assign(value)

    def _optimizer(self) -> EMAOptimizer:
        outermost = getattr(self.model, "optimizer", None)
        optimizer = None if outermost is None else nesting.find(outermost, EMAOptimizer)
        if optimizer is None:
            raise ValueError(
                "EvaluateWithEMA needs an EMAOptimizer, got optimizer="
                f"{getattr(outermost, 'name', None)!r}. Compile the model with "
                "EMAOptimizer(optimizer), or leave the callback out."
            )
        return optimizer


def _updates(optimizer: Any) -> int:
    return int(ops.convert_to_numpy(optimizer.updates))
