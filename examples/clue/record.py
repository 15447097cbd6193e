"""After every epoch: score dev, keep the best weights, write figures, curve and state.

The state is written last. A run killed at any moment continues from the last state and
writes whatever came after it again, with the same content.
"""

import json
import time

import keras
import numpy as np
from learning_curve import plot
from run_directory import RunDirectory, replacing


class Record(keras.callbacks.Callback):
    """The history of a run, kept in its directory.

    Args:
        run: the directory to write to.
        evaluate: model -> figures on dev; the epoch of the highest "accuracy" is the best.

    Attributes:
        history: one dict of figures an epoch; "epoch" counts from 1.
    """

    def __init__(self, run: RunDirectory, evaluate):
        super().__init__()
        self.run, self.evaluate = run, evaluate
        self.history: list[dict] = []

    @property
    def best(self) -> dict:
        """The figures of the best epoch, the first one of equals."""
        return max(self.history, key=lambda figures: figures["dev_accuracy"])

    def restore(self, model: keras.Model) -> None:
        """Continue from the state in the directory, if there is one."""
        if not (self.run / "state.npz").exists():
            return
        with np.load(self.run / "state.npz") as state:
            self.history = json.loads(str(state["history"]))
            arrays = [state[name] for name in state.files if name != "history"]
        for variable, array in zip(_variables(model), arrays, strict=True):
            variable.assign(array)

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self._started
        figures = {"epoch": epoch + 1, "seconds": round(seconds, 2)}
        figures |= {"loss": logs["crossentropy"], "accuracy": logs["accuracy"]}
        figures |= {f"dev_{name}": value for name, value in self.evaluate(self.model).items()}
        self.history.append(figures)
        if self.best["epoch"] == epoch + 1:
            with replacing(self.run / "best.weights.h5") as partial:
                weights_only(self.model).save_weights(partial)
        lines = [json.dumps(figures) for figures in self.history]
        self.run.write_text("metrics.jsonl", "\n".join(lines) + "\n")
        with replacing(self.run / "learning_curve.png") as partial:
            plot(self.history, partial)
        self._save_state()

    def _save_state(self) -> None:
        arrays = [keras.ops.convert_to_numpy(variable) for variable in _variables(self.model)]
        with replacing(self.run / "state.npz") as partial:
            np.savez(partial, *arrays, history=np.array(json.dumps(self.history)))


def weights_only(model: keras.Model) -> keras.Model:
    """The same layers as a plain model; of a compiled one Keras saves the optimizer as well."""
    return keras.Model(model.inputs, model.output)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, the states of the dropout seeds, and the optimizer's slots and counters.

    Keras's own weight files hold no seed states.
    """
    return [*model.variables, *model.optimizer.variables]
