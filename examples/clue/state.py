"""All that a killed training needs to go on, in one file."""

import json
from pathlib import Path

import keras
import numpy as np
from run_directory import replacing


def save_state(path: Path, model: keras.Model, history: list[dict]) -> None:
    """Write the variables of a model and of its optimizer, and the figures so far."""
    arrays = [keras.ops.convert_to_numpy(variable) for variable in _variables(model)]
    with replacing(path) as partial:
        np.savez(partial, *arrays, history=np.array(json.dumps(history)))


def load_state(path: Path, model: keras.Model) -> list[dict]:
    """Restore a model with a built optimizer, if there is a state; the figures so far."""
    if not path.exists():
        return []
    with np.load(path) as state:
        arrays = [state[name] for name in state.files if name != "history"]
        for variable, array in zip(_variables(model), arrays, strict=True):
            variable.assign(array)
        return json.loads(str(state["history"]))


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, the states of the dropout seeds, and the optimizer's slots and counters.

    Keras's own weight files hold no seed states.
    """
    return [*model.variables, *model.optimizer.variables]
