"""PeriodicOptimizer: the slow side moves at every k-th step, and stands still in between."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import build, weights_of
from reference.optimizers import adam, sgd
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer, ClipOptimizer, MultiplierOptimizer
from keras_ext.optimizers.periodic import PeriodicOptimizer
from keras_ext.training import with_objective

BACKEND = keras.backend.backend()
MODES = ["eager", "xla"] if BACKEND != "torch" else ["eager"]
LR = 0.05


@pytest.fixture
def problem():
    return Regression(embedding=False)


def periodic(period=3, slow="bias"):
    return PeriodicOptimizer(
        keras.optimizers.SGD(LR, 0.9), keras.optimizers.Adam(LR), slow, period
    )


def run(model, problem, optimizer, batches=range(6), mode="eager"):
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": True}
    model.compile(optimizer, loss="mse", **compiled)
    for i in batches:
        rows = slice(8 * i, 8 * i + 8)
        model.fit(problem.x[rows], problem.y[rows], batch_size=8, verbose=0)


def reference(problem, period=3, batches=range(6)):
    """SGD with momentum for the kernel, Adam at every `period`-th step for the bias."""
    weights, states = list(problem.weights), [{}, {}]
    fast, slow = sgd(LR, 0.9), adam(LR)
    for t, i in enumerate(batches, start=1):
        grads = problem.gradients(weights, slice(8 * i, 8 * i + 8))
        (kernel,) = fast(weights[:1], grads[:1], states[:1], t)
        weights[0] = kernel
        if t % period == 0:
            (weights[1],) = slow(weights[1:], grads[1:], states[1:], t // period)
    return weights


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference(problem, mode):
    model = build(problem)
    run(model, problem, periodic(), mode=mode)
    for actual, expected in zip(weights_of(model), reference(problem), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_slow_side_stands_still_bit_for_bit(problem, mode):
    model, optimizer = build(problem), periodic()
    run(model, problem, optimizer, range(3), mode)

    def state():
        slow = [*optimizer.slow_variables, *optimizer.slow_optimizer.variables]
        return [np.array(ops.convert_to_numpy(v)) for v in slow]

    before, kernel = state(), model.get_weights()[0]
    for i in (3, 4):
        model.fit(problem.x[8 * i :][:8], problem.y[8 * i :][:8], verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (model.get_weights()[0] != kernel).all()
    model.fit(problem.x[40:], problem.y[40:], verbose=0)
    assert (state()[0] != before[0]).all()


def test_resume_within_a_period(problem, tmp_path):
    model = build(problem)
    run(model, problem, periodic(), range(2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for i in (2, 3):
        loaded.fit(problem.x[8 * i :][:8], problem.y[8 * i :][:8], verbose=0)
    for actual, expected in zip(
        weights_of(loaded), reference(problem, batches=range(4)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_layer_is_slow_and_wrappers_nest(problem):
    model = build(problem)
    bias = keras.layers.Dense(problem.y.shape[1])
    inner = AccumOptimizer(keras.optimizers.SGD(LR), 1)
    optimizer = MultiplierOptimizer(
        PeriodicOptimizer(inner, keras.optimizers.Adam(LR), "bias", 2), {"kernel": 0.0}
    )
    before = weights_of(model)
    run(model, problem, optimizer, range(2))
    assert (weights_of(model)[0] == before[0]).all()
    assert (weights_of(model)[1] != before[1]).all()
    bias.build((None, 2))
    other = keras.Variable(np.zeros(3, "float32"))
    both = PeriodicOptimizer("sgd", "adam", bias)
    both.build([other, *bias.trainable_variables])
    assert [v.path for v in both.slow_variables] == [v.path for v in bias.trainable_variables]


@pytest.mark.parametrize("sides", ["both accumulate", "slow", "fast"])
def test_both_sides_weigh_the_batches(sides):
    problem = Regression(embedding=False, rows=16)  # batches of 6, 6 and 4 rows
    model = with_objective(build(problem), [])

    def side(accumulates):
        sgd = keras.optimizers.SGD(1.0)
        return ClipOptimizer(AccumOptimizer(sgd, 3), 1e6) if accumulates else sgd

    fast, slow = sides != "slow", sides != "fast"
    # A side that does not accumulate makes a step of its own for every batch.
    optimizer = PeriodicOptimizer(side(fast), side(slow), "bias", 1)
    model.compile(optimizer, loss="mse", jit_compile=BACKEND != "torch")
    model.fit(problem.x, problem.y, batch_size=6, shuffle=False, verbose=0)
    expected = list(problem.weights)
    if sides == "both accumulate":
        grads = problem.gradients(problem.weights)
        expected = [w - g for w, g in zip(problem.weights, grads, strict=True)]
    else:
        sums, start = 0.0, problem.weights
        waits = 0 if fast else 1
        for rows in (slice(0, 6), slice(6, 12), slice(12, 16)):
            grads = problem.gradients(expected, rows)
            sums = sums + (rows.stop - rows.start) * grads[waits]
            expected[1 - waits] = expected[1 - waits] - grads[1 - waits]
        expected[waits] = start[waits] - sums / 16
    for actual, e in zip(weights_of(model), expected, strict=True):
        np.testing.assert_allclose(actual, e, atol=1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras refuses another set of variables on JAX")
@pytest.mark.parametrize("frozen", ["trunk", "head"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_side_of_which_all_is_frozen(frozen, weighted):
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, name="trunk")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    model = with_objective(model, []) if weighted else model
    make = AccumOptimizer if weighted else lambda o, k: o
    optimizer = PeriodicOptimizer(
        make(keras.optimizers.Adam(LR), 1), make(keras.optimizers.Adam(LR), 1), "head/", 2
    )
    x, y = np.ones((8, 3)), np.ones((8, 2))
    for trainable in (True, False):
        model.get_layer(frozen).trainable = trainable
        model.compile(optimizer, loss="mse")
        before = {layer: model.get_layer(layer).get_weights() for layer in ("trunk", "head")}
        model.fit(x, y, batch_size=2, verbose=0)
        for layer, weights in before.items():
            still = all(map(np.array_equal, weights, model.get_layer(layer).get_weights()))
            assert still == (layer == frozen and not trainable)


def test_loss_scale_reaches_both():
    outer = keras.optimizers.LossScaleOptimizer(periodic(1))
    kernel, bias = (keras.Variable(np.zeros(2, "float32"), name=n) for n in ("kernel", "bias"))
    outer.build([kernel, bias])
    outer.inner_optimizer.loss_scale_factor = 2.0
    assert outer.inner_optimizer.slow_optimizer.loss_scale_factor == 2.0
    assert outer.inner_optimizer.inner_optimizer.loss_scale_factor == 2.0


def test_errors():
    same = keras.optimizers.Adam()
    for call, message in (
        (lambda: PeriodicOptimizer(same, same, "bias"), "must be another object"),
        (lambda: periodic(0), "period must be an integer >= 1, got 0"),
        (
            lambda: periodic(slow=3),
            "slow must be regular expressions, layers or variables, got 3",
        ),
        (lambda: periodic(slow="x").build([keras.Variable(0.0, name="y")]), "'x' matches no"),
        (lambda: periodic(slow="y").build([keras.Variable(0.0, name="y")]), r"'y'\] is all of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
