"""Variables with other values: what is read, what is assigned, and a gradient in a loss."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

JIT = keras.backend.backend() != "torch"
MODES = ["eager", "compiled"] if JIT else ["eager"]
if keras.backend.backend() == "tensorflow":
    MODES.append("graph")
IDS = np.array([[0, 1, 2], [2, 3, 4], [1, 1, 3], [4, 0, 2]], "int32")
TARGETS = np.array([[1.0], [0.0], [-1.0], [2.0]], "float32")
RATE, EPSILON, MOMENTUM = 0.3, 0.5, 0.9


def array(x):
    return ops.convert_to_numpy(x)


def options(mode):
    return {"run_eagerly": True} if mode == "eager" else {"jit_compile": mode == "compiled"}


class Adversarial(keras.Model):
    """loss(E) + loss(E + epsilon g / |g|), g the gradient of the first on the same draws."""

    def __init__(self):
        super().__init__()
        self.table = keras.layers.Embedding(5, 4, embeddings_initializer="random_normal")
        self.drop = keras.layers.Dropout(RATE, seed=1)
        self.norm = keras.layers.BatchNormalization(momentum=MOMENTUM)
        self.head = keras.layers.Dense(1)
        average = keras.layers.GlobalAveragePooling1D()
        self.network = keras.Sequential(
            [keras.Input((3,)), self.table, average, self.drop, self.norm, self.head]
        )

    def build(self, input_shape):
        pass

    def call(self, x, training=False):
        return x  # so that compute_loss is the only user of the network

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        table, state = self.table.embeddings, self.non_trainable_variables
        before, generator = backend.snapshot(state), backend.generator_state()

        def loss():
            return ops.mean((self.network(x, training=True) - y) ** 2)

        def again(value):
            with backend.substitute([*state, table], [*before, value], "all", generator):
                return loss()

        clean = loss()
        value = table.value + 0  # a tensor, where `value` may be the variable's own
        _, gradient = backend.value_and_grad(again)(value)
        gradient = ops.stop_gradient(gradient)
        shift = EPSILON * gradient / ops.sqrt(ops.sum(gradient**2))
        with backend.substitute([table], [value + shift], discard=self.weights):
            return clean + loss()


def masks(mode):
    """What the Dropout of the model multiplies by in its first two draws."""
    drop = keras.layers.Dropout(RATE, seed=1)

    def draw():
        return drop(ops.ones((4, 4)), training=True), drop(ops.ones((4, 4)), training=True)

    if mode == "compiled":  # XLA draws others than TensorFlow
        draw = backend.compile(draw, drop.variables)
    return [array(mask).astype("float64") for mask in draw()]


def network_loss(weights, mask):
    """The same network by hand, and the mean and variance that it normalises by."""
    table, gamma, beta, kernel, bias = weights
    hidden = table[IDS].mean(1) * mask
    mean, variance = hidden.mean(0), hidden.var(0)
    hidden = gamma * (hidden - mean) / np.sqrt(variance + 1e-3) + beta
    return np.mean((hidden @ kernel + bias - TARGETS) ** 2), mean, variance


def slope(fn, weights, index):
    """The gradient of fn(weights) to one of them, by central differences."""
    found = np.zeros_like(weights[index])
    for place in np.ndindex(found.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = [w.copy() for w in weights]
            moved[index][place] += step
            values.append(fn(moved))
        found[place] = (values[0] - values[1]) / 2e-5
    return found


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_on_a_table_in_fit(mode):
    """Dies on JAX with a StatelessScope, which hides the values of the other variables."""
    model = Adversarial()
    weights = [array(v).astype("float64") for v in model.trainable_variables]
    first, second = masks(mode)
    assert (first != second).any()
    gradient = slope(lambda w: network_loss(w, first)[0], weights, 0)
    shift = EPSILON * gradient / np.sqrt(np.sum(gradient**2))

    def objective(weights):
        attacked = [weights[0] + shift, *weights[1:]]
        return network_loss(weights, first)[0] + network_loss(attacked, second)[0]

    model.compile(keras.optimizers.SGD(1.0), **options(mode))
    history = model.fit(IDS, TARGETS, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(history.history["loss"][0], objective(weights), rtol=1e-5)
    for i, variable in enumerate(model.trainable_variables):
        expected = weights[i] - slope(objective, weights, i)
        np.testing.assert_allclose(array(variable), expected, rtol=1e-4, atol=2e-5)
    assert array(model.drop.seed_generator.state)[1] == 2  # clean and attacked
    _, mean, variance = network_loss(weights, first)  # moved by the clean pass alone
    average = MOMENTUM * np.ones(4) + (1 - MOMENTUM) * variance
    np.testing.assert_allclose(array(model.norm.moving_mean), 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(array(model.norm.moving_variance), average, rtol=1e-4)


def variables(*values):
    return [keras.Variable(v, dtype="float32", trainable=False) for v in values]


def in_mode(fn, mode, listed):
    return fn if mode == "eager" else backend.compile(fn, listed, mode == "compiled")


@pytest.mark.parametrize("mode", MODES)
def test_reads_go_through_and_assignments_come_out(mode):
    a, b, c = variables(1.0, 2.0, 3.0)

    def fn():
        with backend.substitute([a], [ops.convert_to_tensor(10.0)]):
            b.assign(a + b)
            with backend.substitute([b], [b + 100]):
                c.assign(a + b + c)  # 10 + 112 + 3
            return a + b  # the inner scope is closed: 10 + 12

    assert array(in_mode(fn, mode, [a, b, c])()) == 22
    assert [array(v) for v in (a, b, c)] == [1, 12, 125]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("discard", "expected"), [("none", [11, 3]), ("first", [1, 3]), ("all", [1, 2])]
)
def test_what_is_assigned_is_discarded_as_told(mode, discard, expected):
    a, b = variables(1.0, 2.0)

    def fn():
        told = {"none": (), "first": [a], "all": "all"}[discard]
        with backend.substitute([a], [ops.convert_to_tensor(10.0)], told):
            a.assign_add(1.0)
            b.assign_add(1.0)
            return a + b

    assert array(in_mode(fn, mode, [a, b])()) == 14
    assert [array(v) for v in (a, b)] == expected


def test_an_error_inside_assigns_nothing():
    (a,) = variables(1.0)
    with pytest.raises(RuntimeError, match="inside"), backend.substitute([], []):
        a.assign(5.0)
        raise RuntimeError("inside")
    assert array(a) == 1


def test_values_must_have_the_shapes_of_the_variables():
    (a,) = variables(1.0)
    with pytest.raises(ValueError, match="shape"), backend.substitute([a], [np.ones(2)]):
        pass


class TwoPasses(keras.Model):
    """A second pass of the network before the losses of the first are read."""

    def __init__(self, second):
        super().__init__()
        self.second, self.found = second, []
        self.hidden = keras.layers.Dense(3, activity_regularizer="l2")
        self.network = keras.Sequential([keras.Input((2,)), self.hidden])

    def build(self, input_shape):
        pass

    def call(self, x, training=False):
        return self.network(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if self.second:
            with backend.substitute([], []) as inside:
                self.network(2 * x)
            self.found.append(len(inside.losses))
        return super().compute_loss(x, y, y_pred, sample_weight, training)


@pytest.mark.parametrize("mode", MODES)
def test_losses_of_an_extra_pass_stay_inside(mode):
    x, y = np.ones((4, 2), "float32"), np.ones((4, 3), "float32")
    found = []
    for second in (False, True):
        keras.utils.set_random_seed(0)
        model = TwoPasses(second)
        model.compile("sgd", "mse", **options(mode))
        found.append(model.fit(x, y, epochs=2, batch_size=4, verbose=0).history["loss"])
    assert set(model.found) == {1}
    np.testing.assert_allclose(*found)
    keras.utils.set_random_seed(0)  # and the regulariser does count
    kernel, bias = (array(w) for w in TwoPasses(False).network.weights)
    out = x @ kernel + bias
    expected = np.mean((out - y) ** 2) + 0.01 * np.sum(out**2) / 4
    np.testing.assert_allclose(found[0][0], expected, rtol=1e-5)


def test_draws_of_no_variable_are_repeated():
    """A Dropout without a seed draws from the generator of PyTorch, not from its own state."""
    drop = keras.layers.Dropout(0.5)
    ones = ops.ones((64,))
    drop(ones)

    def draw():
        return array(drop(ones, training=True))

    state, before = drop.variables, backend.snapshot(drop.variables)
    generator = backend.generator_state()
    first = draw()
    with backend.substitute(state, before, "all", generator):
        again = draw()
        assert (draw() != again).any()
    np.testing.assert_array_equal(again, first)
    with backend.substitute([], [], "all"):
        ahead = draw()  # of what comes, which does not move
    np.testing.assert_array_equal(draw(), ahead)
    assert (ahead != first).any()
