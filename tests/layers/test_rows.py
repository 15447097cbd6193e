"""A Dense applied by rows is the Dense: values, gradients, shapes, also unknown ones."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend
from keras_ext.layers.rows import by_rows


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 3, 4)])
def test_values(shape):
    dense = keras.layers.Dense(3, activation="gelu", bias_initializer="normal")
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    found, expected = (ops.convert_to_numpy(y) for y in (by_rows(dense, x), dense(x)))
    assert found.shape == (*shape[:-1], 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_gradient_of_the_kernel():
    rng = np.random.default_rng(0)
    x, direction = (rng.normal(size=(4, 5, width)).astype("float32") for width in (6, 3))
    dense = keras.layers.Dense(3)
    dense.build(x.shape)

    def loss(kernel):
        with keras.StatelessScope([(dense.kernel, kernel)]):
            return ops.sum(ops.multiply(by_rows(dense, ops.convert_to_tensor(x)), direction))

    _, gradient = backend.value_and_grad(loss)(dense.kernel.value)
    expected = np.einsum("bti,bto->io", x.astype("float64"), direction)
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), expected, atol=1e-5)


def test_axes_of_unknown_length():
    class Rows(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return by_rows(self.dense, x)

    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, Rows()(inputs))
    assert model.output.shape == (None, None, 3)
    for shape in ((2, 5, 4), (3, 1, 4)):
        assert model.predict(np.ones(shape), verbose=0).shape == (*shape[:-1], 3)
