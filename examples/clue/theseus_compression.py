"""--theseus: half of the blocks, trained in the place of those of a finished run.

The run named is the teacher. Its encoder of 2n blocks becomes one of n, each a copy of one of
the first n blocks, which replaces two of the teacher's at random, more and more often: with
probability 0.3 at first, always from the middle of the training on. All else stays as it was.
Dev figures, predictions and `successor.weights.h5` are those of the n blocks alone.

Source: Xu et al. 2020, arXiv 2002.02925; kexue.fm/archives/7575.
"""

from pathlib import Path

import keras
from data import TaskData
from errors import UserError
from settings import Settings

from keras_ext.training import LinearReplacement, build_theseus_model, extract_successor

START = 0.3  # the replacement rate of the first step


def training_model(
    trunk: keras.Model, head, data: TaskData, settings: Settings, teacher: Path
) -> tuple[keras.Model, list, keras.KerasTensor]:
    """The encoder to train, and inputs and outputs of the head on it.

    Args:
        trunk: an encoder as the teacher's.

    Raises:
        UserError: the teacher has an odd number of blocks.
    """
    whole = keras.Model(*head.build_model(trunk, data, settings))
    whole.load_weights(teacher / "best.weights.h5")
    try:
        student = build_theseus_model(trunk)
    except ValueError as error:
        raise UserError(f"{teacher} cannot be compressed: {error}") from error
    inputs, outputs = head.build_model(student, data, settings)
    for layer in _head(keras.Model(inputs, outputs), student):
        layer.set_weights(whole.get_layer(layer.name).get_weights())
        layer.trainable = False
    return student, inputs, outputs


def schedule(updates: int) -> keras.callbacks.Callback:
    """The replacement rate, for a training of so many updates."""
    return LinearReplacement(slope=2 * (1 - START) / max(1, updates), start=START)


def successor(
    model: keras.Model, student: keras.Model, head, data: TaskData, settings: Settings
) -> keras.Model:
    """What `model` computes in inference, as a model of n blocks."""
    small = extract_successor(student)
    alone = keras.Model(*head.build_model(small, data, settings))
    for layer in _head(alone, small):
        layer.set_weights(model.get_layer(layer.name).get_weights())
    return alone


def _head(model: keras.Model, trunk: keras.Model) -> list[keras.layers.Layer]:
    of_trunk = {id(layer) for layer in (trunk, *trunk.layers)}
    return [layer for layer in model.layers if layer.weights and id(layer) not in of_trunk]
