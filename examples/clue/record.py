"""After every epoch: score dev, keep the best weights, write figures, curve and state.

The state is written last. A run killed at any moment continues from the last state and
writes whatever came after it again, with the same content.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import keras
from learning_curve import plot
from run_directory import RunDirectory, replacing
from state import load_state, save_state

from keras_ext.training import EvaluateWithEMA


class Record(keras.callbacks.Callback):
    """The history of a run, kept in its directory.

    Args:
        run: the directory to write to.
        metric: the figure on dev whose highest value makes an epoch the best.
        evaluate: model -> figures on dev.
        averaged: whether the weights to score and keep are the averages of an `EMAOptimizer`.

    Attributes:
        history: one dict of figures an epoch; "epoch" counts from 1.
    """

    def __init__(self, run: RunDirectory, metric: str, evaluate, averaged: bool = False):
        super().__init__()
        self.averages = EvaluateWithEMA() if averaged else None
        self.run, self.metric, self.evaluate = run, metric, evaluate
        self.history: list[dict] = []

    @property
    def best(self) -> dict:
        """The figures of the best epoch, the first one of equals."""
        return max(self.history, key=lambda figures: figures[f"dev_{self.metric}"])

    def restore(self, model: keras.Model) -> None:
        """Continue from the state in the directory, if there is one."""
        self.history = load_state(self.run / "state.npz", model)

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self._started
        figures = {"epoch": epoch + 1, "seconds": round(seconds, 2)}
        figures["loss"] = logs["crossentropy"]
        if self.metric in logs:
            figures[self.metric] = logs[self.metric]
        with self._weights_that_count():
            scores = self.evaluate(self.model)
            figures |= {f"dev_{name}": value for name, value in scores.items()}
            self.history.append(figures)
            if self.best["epoch"] == epoch + 1:
                with replacing(self.run / "best.weights.h5") as partial:
                    weights_only(self.model).save_weights(partial)
        lines = [json.dumps(figures) for figures in self.history]
        self.run.write_text("metrics.jsonl", "\n".join(lines) + "\n")
        with replacing(self.run / "learning_curve.png") as partial:
            plot(self.history, self.metric, partial)
        save_state(self.run / "state.npz", self.model, self.history)

    @contextmanager
    def _weights_that_count(self) -> Iterator[None]:
        if self.averages is None:
            yield
            return
        self.averages.set_model(self.model)
        self.averages.on_test_begin()
        try:
            yield
        finally:
            self.averages.on_test_end()


def weights_only(model: keras.Model) -> keras.Model:
    """The same layers as a plain model; of a compiled one Keras saves the optimizer as well."""
    return keras.Model(model.inputs, model.output)
