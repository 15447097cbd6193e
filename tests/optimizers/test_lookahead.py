"""LookaheadOptimizer: closed forms, float64 NumPy, optax, and when it counts."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import build, distance, fit, weights_of
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.optimizers.lookahead import LookaheadOptimizer
from keras_ext.optimizers.update_wrapper import UpdateWrapper

BACKEND = keras.backend.backend()
LR = 0.05
JIT = {"jit_compile": BACKEND != "torch"}


def lookahead(problem, update, batches, period, size, end_of_fit=True):
    """Weights after one update per batch; the slow weights move after every `period`."""
    slow = fast = problem.weights
    state = [{} for _ in fast]
    for t, rows in enumerate(batches, start=1):
        fast = update(fast, problem.gradients(fast, rows), state, t)
        if t % period == 0 or (end_of_fit and t == len(batches)):
            slow = fast = [q + size * (p - q) for q, p in zip(slow, fast, strict=True)]
    return fast


def batches(size, rows=48):
    return [slice(i, i + size) for i in range(0, rows, size)]


def number(variable):
    return ops.convert_to_numpy(ops.cast(variable, "float32")).astype("float64")


def step(optimizer, variable, gradient):
    optimizer.apply([ops.convert_to_tensor(gradient, variable.dtype)], [variable])


# --- the mathematics


@pytest.mark.parametrize(
    ("embedding", "period", "mode"),
    [(False, 1, "eager"), (True, 2, "xla"), (True, 4, "eager"), (False, 4, "xla")],
)
def test_equals_numpy_in_fit(embedding, period, mode):
    problem = Regression(embedding)  # 6 updates: with 4 the end of fit cuts a period short
    compiled = {"run_eagerly": True} if mode == "eager" else JIT
    inner = keras.optimizers.SGD(LR, momentum=0.9)
    actual = fit(build(problem), problem, LookaheadOptimizer(inner, period, 0.3), 8, **compiled)
    expected = lookahead(problem, numpy_optimizers.sgd(LR, 0.9), batches(8), period, 0.3)
    assert distance(actual, expected) < 1e-6
    assert distance(actual, problem.train(numpy_optimizers.sgd(LR, 0.9), batches(8))) > 1e-3


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_one_whole_step_is_the_inner_optimizer(mode):
    problem = Regression(embedding=False)
    compiled = {"run_eagerly": True} if mode == "eager" else JIT
    wrapped = LookaheadOptimizer(keras.optimizers.Adam(LR), 2, 1.0)
    actual = fit(build(problem), problem, wrapped, 8, **compiled)
    expected = fit(build(problem), problem, keras.optimizers.Adam(LR), 8, **compiled)
    # XLA fuses the two programs in different ways.
    assert distance(actual, expected) <= (0 if mode == "eager" else 3e-7)


def test_period_of_one_with_sgd_is_a_smaller_learning_rate():
    problem = Regression(embedding=False)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR), 1, 0.25)
    actual = fit(build(problem), problem, optimizer, 8)
    expected = problem.train(numpy_optimizers.sgd(0.25 * LR), batches(8))
    assert distance(actual, expected) < 1e-6


def test_contraction_on_a_quadratic():
    # Loss L w^2 / 2, whose gradient is L w; two whole cycles and one step of the third.
    rate, curvature, period, size = 0.3, np.array([0.5, 2.0, 6.0]), 3, 0.5
    variable = keras.Variable([1.0, -2.0, 3.0])
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(rate), period, size)
    for _ in range(2 * period + 1):
        step(optimizer, variable, curvature * number(variable))
    shrink = (1 - size) + size * (1 - rate * curvature) ** period
    expected = shrink**2 * (1 - rate * curvature) * [1.0, -2.0, 3.0]
    np.testing.assert_allclose(number(variable), expected, rtol=1e-5)


def test_first_sync_does_not_halve_the_weights():
    variable = keras.Variable([8.0, -4.0])
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(1.0), 2, 0.5)
    for gradient in (1.0, 1.0):
        step(optimizer, variable, [gradient, gradient])
    np.testing.assert_allclose(number(variable), [7.0, -5.0])


def test_between_syncs_it_is_the_inner_optimizer():
    ours, theirs = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = LookaheadOptimizer(keras.optimizers.Adam(LR), 3, 0.5)
    plain = keras.optimizers.Adam(LR)
    for gradient in (1.0, -3.0):
        step(optimizer, ours, [gradient])
        step(plain, theirs, [gradient])
    np.testing.assert_array_equal(number(ours), number(theirs))
    assert int(optimizer.cycle_step) == 2


def test_a_sync_keeps_the_moments_of_the_inner_optimizer():
    problem = Regression(embedding=False)
    optimizer = LookaheadOptimizer(keras.optimizers.Adam(LR), 2, 0.5)
    actual = fit(build(problem), problem, optimizer, 8)
    expected = lookahead(problem, numpy_optimizers.adam(LR), batches(8), 2, 0.5)
    assert distance(actual, expected) < 2e-6


def test_equals_optax():
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 2)).astype("float32")
    variable = keras.Variable(start)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR, momentum=0.9), 3, 0.5)
    # Their Adam and Keras's place epsilon differently; momentum is the same.
    theirs = optax.lookahead(optax.sgd(LR, momentum=0.9), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jax.numpy.asarray(start))
    state = theirs.init(params)
    for _ in range(7):
        gradient = rng.normal(size=(3, 2)).astype("float32")
        step(optimizer, variable, gradient)
        updates, state = theirs.update(jax.numpy.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(number(variable), np.asarray(params.fast), atol=1e-6)


def test_weights_that_do_not_move_keep_every_bit():
    values = np.random.default_rng(0).normal(size=50).astype("float32")
    variable = keras.Variable(values)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(1.0), 1, 0.3)
    for _ in range(5):
        step(optimizer, variable, np.zeros(50))
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), values)


# --- where the slow weights start


def test_starts_at_weights_that_are_assigned_after_build():
    problem = Regression(embedding=False)
    model = build(problem)
    for variable in model.weights:
        variable.assign(ops.zeros(variable.shape))
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR), 2, 0.5)
    optimizer.build(model.trainable_variables)
    for variable, value in zip(model.weights, problem.weights, strict=True):  # "load_weights"
        variable.assign(value)
    expected = lookahead(problem, numpy_optimizers.sgd(LR), batches(8), 2, 0.5)
    assert distance(fit(model, problem, optimizer, 8), expected) < 1e-6


def test_a_second_fit_starts_at_weights_that_are_assigned_in_between():
    # 3 updates end the first fit inside a period of 2: it is cut short, nothing is left over.
    problem = Regression(embedding=False)
    model = build(problem)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR), 2, 0.5)
    fit(model, problem, optimizer, 16)
    assert int(optimizer.cycle_step) == 0
    for variable, value in zip(model.weights, problem.weights, strict=True):
        variable.assign(value)
    model.fit(problem.x, problem.y, batch_size=16, shuffle=False, verbose=0)
    expected = lookahead(problem, numpy_optimizers.sgd(LR), batches(16), 2, 0.5)
    assert distance(weights_of(model), expected) < 1e-6


def test_evaluation_between_two_fits():
    # JAX reuses the memory of weights given to a step; the slow weights must not share it.
    problem = Regression(embedding=False)
    model = build(problem)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR), 2, 0.5)
    fit(model, problem, optimizer, 16, **JIT)
    model.evaluate(problem.x, problem.y, verbose=0)
    model.fit(problem.x, problem.y, batch_size=16, shuffle=False, verbose=0)
    first = lookahead(problem, numpy_optimizers.sgd(LR), batches(16), 2, 0.5)
    problem.weights = first
    second = lookahead(problem, numpy_optimizers.sgd(LR), batches(16), 2, 0.5)
    assert distance(weights_of(model), second) < 1e-6


# --- bfloat16, constraints, gradients


def test_bfloat16_weights_have_float32_slow_weights():
    # p goes one spacing of bfloat16 (2^-7 above 1) ahead, q a quarter of it: without the
    # digits that q has beyond the weight both would stay at 1 for ever.
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(2.0**-7), 1, 0.25)
    slow = weight = 1.0
    for _ in range(40):
        step(optimizer, variable, [-1.0])
        slow += 0.25 * (weight + 2.0**-7 - slow)
        weight = np.round(slow * 2**7) / 2**7
    assert weight > 1.05
    assert optimizer.slow_weights[0].dtype == "float32"
    assert variable.dtype == "bfloat16"
    np.testing.assert_allclose(number(optimizer.slow_weights[0]), slow, rtol=1e-6)
    np.testing.assert_array_equal(number(variable), weight)


def test_constraints_hold_after_a_sync():
    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint="unit_norm")
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [0.0]])
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(1.0), 1, 0.5)
    for _ in range(3):
        step(optimizer, layer.kernel, [[0.0], [-1.0]])
        np.testing.assert_allclose(np.linalg.norm(number(layer.kernel)), 1.0, rtol=1e-5)
    # A second step starts from the constrained weights: q = w, seen from where it goes.
    before = number(layer.kernel)
    step(optimizer, layer.kernel, [[0.0], [0.0]])
    np.testing.assert_allclose(number(layer.kernel), before, rtol=1e-5)


def test_absent_gradients():
    used, unused = keras.Variable([1.0]), keras.Variable([0.7])
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(1.0), 2, 0.5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        for _ in range(2):
            optimizer.apply([ops.ones(1), None], [used, unused])
    np.testing.assert_allclose(number(used), [0.0])
    np.testing.assert_array_equal(ops.convert_to_numpy(unused), np.float32([0.7]))


def test_nan_is_not_hidden_and_not_kept_once_the_weights_are_replaced():
    variable = keras.Variable([1.0])
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(1.0), 1, 0.5)
    step(optimizer, variable, [np.nan])
    assert np.isnan(number(variable)).all()
    variable.assign([1.0])
    step(optimizer, variable, [1.0])
    np.testing.assert_allclose(number(variable), [0.5])


# --- real updates


@pytest.mark.parametrize("where", ["inside", "around"])
def test_with_an_accum_optimizer_periods_count_updates(where):
    problem = Regression(embedding=True)
    sgd = keras.optimizers.SGD(LR, momentum=0.9)
    if where == "inside":
        optimizer = LookaheadOptimizer(AccumOptimizer(sgd, 2), 2, 0.5)
    else:
        optimizer = AccumOptimizer(LookaheadOptimizer(sgd, 2, 0.5), 2)
    actual = fit(build(problem), problem, optimizer, 4, **JIT)
    expected = lookahead(problem, numpy_optimizers.sgd(LR, 0.9), batches(8), 2, 0.5)
    assert distance(actual, expected) < 1e-6
    assert int(optimizer.iterations) == 6


def test_nothing_moves_on_micro_batches():
    variable = keras.Variable([1.0])
    optimizer = LookaheadOptimizer(AccumOptimizer(keras.optimizers.SGD(1.0), 3), 1, 0.5)
    seen = []
    for _ in range(6):
        step(optimizer, variable, [1.0])
        seen.append(number(variable)[0])
    np.testing.assert_allclose(seen, [1.0, 1.0, 0.5, 0.5, 0.5, 0.0])


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_remainder_of_accumulation_is_part_of_the_last_period(where):
    # 6 micro-batches, k = 4: one update in fit, one at its end. Two updates, one period.
    problem = Regression(embedding=False)
    sgd = keras.optimizers.SGD(LR)
    if where == "inside":
        optimizer = LookaheadOptimizer(AccumOptimizer(sgd, 4), 2, 0.5)
    else:
        optimizer = AccumOptimizer(LookaheadOptimizer(sgd, 2, 0.5), 4)
    with pytest.warns(UserWarning, match="2 of 4"):
        actual = fit(build(problem), problem, optimizer, 8)
    parts = [slice(0, 32), slice(32, 48)]
    expected = lookahead(problem, numpy_optimizers.sgd(LR), parts, 2, 0.5)
    assert distance(actual, expected) < 1e-6


def test_a_remainder_that_is_a_period_of_its_own():
    problem = Regression(embedding=False)
    optimizer = LookaheadOptimizer(AccumOptimizer(keras.optimizers.SGD(LR), 4), 1, 0.5)
    with pytest.warns(UserWarning, match="2 of 4"):
        actual = fit(build(problem), problem, optimizer, 8)
    parts = [slice(0, 32), slice(32, 48)]
    expected = lookahead(problem, numpy_optimizers.sgd(LR), parts, 1, 0.5)
    assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize("where", ["inside", "around"])
def test_an_overflow_is_no_update(where):
    problem = Regression(embedding=False)
    problem.y[0] = np.inf  # the first of 6 batches is lost
    scale = keras.optimizers.LossScaleOptimizer
    sgd = keras.optimizers.SGD(LR)
    if where == "inside":
        optimizer = LookaheadOptimizer(scale(sgd), 2, 0.5)
    else:
        optimizer = scale(LookaheadOptimizer(sgd, 2, 0.5))
    actual = fit(build(problem), problem, optimizer, 8)
    expected = lookahead(problem, numpy_optimizers.sgd(LR), batches(8)[1:], 2, 0.5)
    assert distance(actual, expected) < 1e-6
    assert int(optimizer.iterations) == 5


def test_counts_its_own_updates():
    # An optimizer that has already made three updates: periods start with the wrapper.
    inner = keras.optimizers.SGD(1.0)
    variable = keras.Variable([0.0])
    for _ in range(3):
        step(inner, variable, [0.0])
    optimizer = LookaheadOptimizer(inner, 2, 0.5)
    step(optimizer, variable, [1.0])
    np.testing.assert_allclose(number(variable), [-1.0])
    step(optimizer, variable, [1.0])
    np.testing.assert_allclose(number(variable), [-1.0])  # -2, and half of the way back


# --- state


def test_state_is_one_float32_copy():
    variables = [keras.Variable(np.ones((3, 4)), dtype="bfloat16"), keras.Variable([1.0])]
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR))
    optimizer.build(variables)
    assert [tuple(v.shape) for v in optimizer.slow_weights] == [(3, 4), (1,)]
    assert {v.dtype for v in optimizer.slow_weights} == {"float32"}
    assert sum(v.shape != () for v in optimizer.own_variables) == 2


def test_config_round_trip():
    optimizer = LookaheadOptimizer(keras.optimizers.Adam(LR), 7, 0.8, name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
        assert copy.sync_period == 7
        assert copy.slow_step_size == 0.8


def test_a_failing_fit_shows_its_own_error():
    def broken(y_true, y_pred):
        raise ZeroDivisionError("in the loss")

    problem = Regression(embedding=False)
    model = build(problem)
    model.compile(LookaheadOptimizer("sgd"), loss=broken)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        model.fit(problem.x, problem.y, verbose=0)


def test_mixed_float16():
    problem = Regression(embedding=True)
    optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR), 2, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU
        after = fit(build(problem, dtype="mixed_float16"), problem, optimizer, 8)
    expected = lookahead(problem, numpy_optimizers.sgd(LR), batches(8), 2, 0.5)
    assert distance(after, expected) < 5e-3


# --- two devices


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize("accum", [False, True], ids=["plain", "accum"])
def test_mirrored_strategy(mirrored, accum):
    problem = Regression(embedding=True)
    with mirrored.scope():
        model = build(problem)
        inner = keras.optimizers.SGD(LR, momentum=0.9)
        inner = AccumOptimizer(inner, 2) if accum else inner
        optimizer = LookaheadOptimizer(inner, 4, 0.5)  # the end of fit cuts a period short
    actual = fit(model, problem, optimizer, 4 if accum else 8, jit_compile=False)
    expected = lookahead(problem, numpy_optimizers.sgd(LR, 0.9), batches(8), 4, 0.5)
    assert distance(actual, expected) < 1e-6
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel():
    problem = Regression(embedding=True)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        optimizer = LookaheadOptimizer(keras.optimizers.SGD(LR, momentum=0.9), 4, 0.5)
        actual = fit(build(problem), problem, optimizer, 8)
        assert len(optimizer.slow_weights[0].value.sharding.device_set) == 2
    finally:
        keras.distribution.set_distribution(None)
    expected = lookahead(problem, numpy_optimizers.sgd(LR, 0.9), batches(8), 4, 0.5)
    assert distance(actual, expected) < 1e-6


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_period": 0}, "sync_period must be an integer >= 1, got 0"),
        ({"sync_period": 5.0}, "sync_period must be an integer >= 1, got 5.0"),
        ({"sync_period": True}, "sync_period must be an integer >= 1, got True"),
        ({"slow_step_size": 0.0}, r"slow_step_size must be a number in \(0, 1\], got 0.0"),
        ({"slow_step_size": 1.5}, r"slow_step_size must be a number in \(0, 1\], got 1.5"),
        (
            {"slow_step_size": float("nan")},
            r"slow_step_size must be a number in \(0, 1\], got nan",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookaheadOptimizer("sgd", **arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="steps"):
        LookaheadOptimizer("sgd", steps=5)


def test_refuses_to_move_what_others_follow():
    with pytest.raises(ValueError, match="goes outside"):
        LookaheadOptimizer(keras.optimizers.SGD(use_ema=True))
    with pytest.raises(ValueError, match="goes outside"):
        LookaheadOptimizer(LookaheadOptimizer("sgd"))
    with pytest.raises(ValueError, match="goes outside"):
        UpdateWrapper(LookaheadOptimizer("sgd"))
