"""Objectives on two devices: norms per replica under tf.distribute, else global."""

import contextlib

import keras
import numpy as np
import pytest
from training.test_objective_steps import X, Y, flat, uncoupled

from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import FGM, RDrop, with_objective

BACKEND = keras.backend.backend()
LOSS = "sparse_categorical_crossentropy"
X8, Y8 = np.concatenate([X, X[::-1]]), np.concatenate([Y, (Y + 1) % 3])


def moved(x, y, objectives, scope=None, accum=1, batch_size=4):
    """What SGD(1) subtracts from the weights, and the loss."""
    with scope or contextlib.nullcontext():
        plain = uncoupled()
        optimizer = keras.optimizers.SGD(1.0)
        optimizer = AccumOptimizer(optimizer, accum) if accum > 1 else optimizer
        model = with_objective(plain, objectives)
        model.compile(optimizer, LOSS, jit_compile=False)
    before = flat(plain)
    loss = model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0).history["loss"][0]
    return before - flat(plain), loss


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize("on", ["matrix", "output"])
def test_mirrored_strategy(mirrored, on):
    """Each replica attacks its half of the batch."""

    def objectives():
        return [FGM("embedding", 0.3, on=on), RDrop(1.0)]

    halves = [moved(X[rows], Y[rows], objectives()) for rows in (slice(0, 2), slice(2, 4))]
    step, loss = moved(X, Y, objectives(), mirrored.scope())
    np.testing.assert_allclose(step, (halves[0][0] + halves[1][0]) / 2, atol=1e-6)
    np.testing.assert_allclose(loss, (halves[0][1] + halves[1][1]) / 2, rtol=1e-6)
    whole, _ = moved(X, Y, objectives())
    assert np.abs(step - whole).max() > 1e-4
    # Micro-batches of 4 and 2 rows weigh by their rows.
    parts = [
        moved(X8[rows], Y8[rows], objectives(), mirrored.scope())[0]
        for rows in (slice(0, 4), slice(4, 6))
    ]
    both, _ = moved(X8[:6], Y8[:6], objectives(), mirrored.scope(), accum=2)
    np.testing.assert_allclose(both, (4 * parts[0] + 2 * parts[1]) / 6, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel():
    """The attack is that on the whole batch."""
    single, loss = moved(X, Y, [FGM("embedding", 0.3, on="output")])
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        step, loss_2 = moved(X, Y, [FGM("embedding", 0.3, on="output")])
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(step, single, atol=1e-6)
    np.testing.assert_allclose(loss_2, loss, rtol=1e-6)
