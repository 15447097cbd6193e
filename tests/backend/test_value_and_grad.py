"""A gradient inside of a loss: of any order, with state that moves once."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

JIT = keras.backend.backend() != "torch"
X = np.array([1.0, -2.0, 3.0], "float32")


def tensor(x):
    return ops.convert_to_tensor(x)


def test_value_aux_and_structure():
    def fn(p, factor):
        return factor * ops.sum(p["a"] * p["b"] ** 2), [p["a"], "anything"]

    inputs = {"a": tensor(X), "b": tensor(2 * X), "c": tensor(X)}
    (value, (a, word)), grads = backend.value_and_grad(fn, has_aux=True)(inputs, 3.0)
    np.testing.assert_allclose(ops.convert_to_numpy(value), 3 * np.sum(4 * X**3))
    np.testing.assert_array_equal(ops.convert_to_numpy(a), X)
    assert word == "anything"
    np.testing.assert_allclose(ops.convert_to_numpy(grads["a"]), 12 * X**2)
    np.testing.assert_allclose(ops.convert_to_numpy(grads["b"]), 12 * X**2)
    assert not ops.convert_to_numpy(grads["c"]).any()  # not connected: zeros


def test_third_derivative():
    fn = lambda x: ops.sum(x**4)  # noqa: E731
    for _ in range(2):
        fn = lambda x, fn=fn: ops.sum(backend.value_and_grad(fn)(x)[1])  # noqa: E731
    _, gradient = backend.value_and_grad(fn)(tensor(X))
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), 24 * X, rtol=1e-6)


def test_gradient_of_one_use_only():
    def outer(x):  # d/dx of x y at y = x, times x
        _, gradient = backend.value_and_grad(lambda x, y: ops.sum(x * y))(x, x)
        return ops.sum(gradient * x)

    value, gradient = backend.value_and_grad(outer)(tensor(X))
    np.testing.assert_allclose(ops.convert_to_numpy(value), np.sum(X**2))
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), 2 * X)


def test_no_gradient_flows_through_a_constant():
    def outer(x):
        value, gradient = backend.value_and_grad(lambda x: ops.sum(x**3), constant=True)(x)
        return ops.sum(gradient * x) + value

    value, gradient = backend.value_and_grad(outer)(tensor(X))
    np.testing.assert_allclose(ops.convert_to_numpy(value), np.sum(4 * X**3))
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), 3 * X**2)


def softmax(s):
    s = np.exp(s - s.max(-1, keepdims=True))
    return s / s.sum(-1, keepdims=True)


def test_second_derivative_through_attention():
    """Of the fused kernel of PyTorch there is none, so attention leaves it."""
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 2)).astype("float32")

    def loss(x):
        return ops.sum(ops.dot_product_attention(x, x, x) ** 2)

    def slope(x):
        return ops.sum(backend.value_and_grad(loss)(x)[1] ** 2)

    value, gradient = backend.value_and_grad(slope)(tensor(x))

    def by_hand(x):  # the squared slope, by central differences
        def loss(x):
            y = x[0, :, 0]
            return ((softmax(y @ y.T / np.sqrt(2)) @ y) ** 2).sum()

        return sum(derivative(loss, x, place) ** 2 for place in np.ndindex(x.shape))

    wide = x.astype("float64")
    np.testing.assert_allclose(ops.convert_to_numpy(value), by_hand(wide), rtol=1e-5)
    expected = [derivative(by_hand, wide, place, 1e-4) for place in np.ndindex(x.shape)]
    np.testing.assert_allclose(ops.convert_to_numpy(gradient).ravel(), expected, rtol=1e-4)


def derivative(fn, x, place, step=1e-5):
    shift = np.zeros_like(x)
    shift[place] = step
    return (fn(x + shift) - fn(x - shift)) / (2 * step)


class SlopePenalised(keras.Model):
    """Adds the squared slope of a network with state to its mean squared error."""

    def __init__(self, *layers):
        super().__init__()
        self.network = keras.Sequential([keras.Input((3,)), *layers])

    def build(self, input_shape):
        pass

    def call(self, x, training=False):
        return x  # so that compute_loss is the only user of the network

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        def total(x):
            return ops.sum(self.network(x, training=training) ** 3)

        value, gradient = backend.value_and_grad(total)(x)
        return value + ops.mean(gradient**2)


@pytest.mark.parametrize("mode", ["eager", "xla"] if JIT else ["eager"])
def test_seeds_and_moving_averages_move_once(mode):
    model = SlopePenalised(
        keras.layers.Dense(1, kernel_initializer="ones"),
        keras.layers.Dropout(0.5, seed=0),
        keras.layers.BatchNormalization(momentum=0.5),
    )
    options = {"run_eagerly": True} if mode == "eager" else {"jit_compile": True}
    model.compile(keras.optimizers.SGD(0.0), **options)
    x = np.ones((4, 3), "float32")
    model.fit(x, epochs=2, batch_size=4, verbose=0)
    dropout, norm = model.network.layers[1:]
    assert ops.convert_to_numpy(dropout.seed_generator.state)[1] == 2
    kernel = model.network.layers[0].kernel
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), 1)
    # Whatever was dropped, each row was 0 or 6 before normalisation; the average forgets half.
    # So it is m / 4 + m' / 2 with means m, m' of four rows, which are multiples of 1.5.
    multiple = float(ops.convert_to_numpy(norm.moving_mean)[0]) * 4 / 1.5
    assert multiple > 0
    np.testing.assert_allclose(multiple, round(multiple), atol=1e-5)


def test_the_gradient_of_a_slope_reaches_the_weights():
    model = SlopePenalised(keras.layers.Dense(1))
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    kernel, bias = model.network.get_weights()
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model.train_on_batch(x)
    score = x @ kernel + bias  # loss = sum s^3 + mean (3 s^2 w)^2
    expected = x.T @ (3 * score**2 + 9 * score**3 * (kernel**2).mean())
    expected += 6 * kernel * (score**4).mean()
    moved = kernel - model.network.get_weights()[0]
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4)
