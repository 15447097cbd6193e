"""gradient_only and GradientReversal: exact values, and gradients where they belong."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend
from keras_ext.layers.gradient_stop import GradientReversal, gradient_only

X = np.array([[0.5, -1.0], [2.0, 3.0]], "float32")


def gradients(fn, *inputs):
    """Value and gradients of `fn(*inputs)`, as NumPy arrays."""
    tensors = [ops.convert_to_tensor(x) for x in inputs]
    value, grads = backend.value_and_grad(lambda tensors: fn(*tensors))(tensors)
    return float(ops.convert_to_numpy(value)), [ops.convert_to_numpy(g) for g in grads]


def test_gradient_to_the_input_alone():
    value, (to_x, to_w) = gradients(
        lambda x, w: gradient_only(lambda x: ops.sum(w * x**3), x), X, 1 + X
    )
    assert value == 0
    np.testing.assert_allclose(to_x, (1 + X) * 3 * X**2, rtol=1e-6)
    assert not to_w.any()


def test_what_f_returned_has_the_gradient_of_its_weights_alone():
    def loss(x, w):
        zero, (_, y) = gradient_only(lambda x: (ops.sum(w * x**3), w * x), x, has_aux=True)
        return 10 * zero + ops.sum(y**2)

    value, (to_x, to_w) = gradients(loss, X, 1 + X)
    np.testing.assert_allclose(value, np.sum((X * (1 + X)) ** 2), rtol=1e-6)
    np.testing.assert_allclose(to_x, 30 * (1 + X) * X**2, rtol=1e-6)
    np.testing.assert_allclose(to_w, 2 * (1 + X) * X**2, rtol=1e-6)


def test_one_evaluation_also_with_dropout():
    dropout = keras.layers.Dropout(0.5, seed=1)
    ones = np.ones((8, 8), "float32")
    seen = []

    def f(x):
        seen.append(x)
        return ops.sum(dropout(x, training=True))

    value, (to_x, to_w) = gradients(
        lambda x, w: gradient_only(lambda x: f(w * x), x), ones, ones
    )
    assert len(seen) == 1
    assert value == 0
    assert not to_w.any()
    assert set(to_x.ravel()) == {0.0, 2.0}
    state = ops.convert_to_numpy(dropout.seed_generator.state)  # the seed advanced once
    assert state[1] == 1


def test_a_structure_of_inputs():
    value, (a, b) = gradients(
        lambda a, b: gradient_only(lambda p: ops.sum(p["a"] * p["b"]), {"a": a, "b": b}),
        X,
        2 * X,
    )
    assert value == 0
    np.testing.assert_allclose(a, 2 * X)
    np.testing.assert_allclose(b, X)


def test_f_must_return_a_scalar():
    with pytest.raises(ValueError, match=r"scalar, got the shape \(2, 2\). Take its mean"):
        gradient_only(lambda x: x**2, ops.convert_to_tensor(X))


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_reversal(scale):
    layer = GradientReversal(scale)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(X)), X)
    _, (to_x,) = gradients(lambda x: ops.sum(layer(x) ** 2), X)
    np.testing.assert_allclose(to_x, -scale * 2 * X, rtol=1e-6)


def test_reversal_needs_a_scale():
    with pytest.raises(ValueError, match="scale must be at least 0, got -1"):
        GradientReversal(-1)
