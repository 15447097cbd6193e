"""EMAOptimizer: the average is the weighted mean of all weights so far, real updates only."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import build, distance, fit, weights_of
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.optimizers.ema import EMAOptimizer
from keras_ext.optimizers.lookahead import LookaheadOptimizer
from keras_ext.optimizers.update_wrapper import UpdateWrapper

BACKEND = keras.backend.backend()
LR = 0.05
JIT = {"jit_compile": BACKEND != "torch"}


def path_of(problem, update, batches):
    """The weights after each update."""
    weights, state, path = problem.weights, [{} for _ in problem.weights], []
    for t, rows in enumerate(batches, start=1):
        weights = update(weights, problem.gradients(weights, rows), state, t)
        path.append(weights)
    return path


def mean_of(path, momentum):
    """(w_t + mu w_(t-1) + ...) / (1 + mu + ...), from its definition."""
    shares = momentum ** np.arange(len(path) - 1.0, -1, -1)
    shares /= shares.sum()
    return [
        sum(s * w for s, w in zip(shares, ws, strict=True)) for ws in zip(*path, strict=True)
    ]


def batches(size):
    return [slice(i, i + size) for i in range(0, 48, size)]


def numbers(variables):
    return [ops.convert_to_numpy(ops.cast(v, "float32")).astype("float64") for v in variables]


def averages_of(optimizer):
    return numbers(optimizer.averages)


def step(optimizer, variable, gradient):
    optimizer.apply([ops.convert_to_tensor(gradient, variable.dtype)], [variable])


# --- the mathematics


@pytest.mark.parametrize(
    ("embedding", "momentum", "mode"),
    [
        (True, 1e-3, "eager"),
        (False, 0.5, "xla"),
        (True, 0.999, "xla"),
        (False, 0.999999, "eager"),
    ],
)
def test_equals_the_weighted_mean_in_fit(embedding, momentum, mode):
    problem = Regression(embedding)
    compiled = {"run_eagerly": True} if mode == "eager" else JIT
    optimizer = EMAOptimizer(keras.optimizers.SGD(LR, momentum=0.9), momentum)
    actual = fit(build(problem), problem, optimizer, 8, **compiled)
    path = path_of(problem, numpy_optimizers.sgd(LR, 0.9), batches(8))
    assert distance(actual, path[-1]) < 1e-6  # trained as without
    assert distance(averages_of(optimizer), mean_of(path, momentum)) < 1e-6
    assert int(optimizer.updates) == 6
    if momentum > 0.1:
        assert distance(actual, averages_of(optimizer)) > 1e-3


def test_first_average_is_the_first_weight_exactly():
    values = np.random.default_rng(0).normal(size=20).astype("float32")
    variable = keras.Variable(np.zeros(20, "float32"))
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.999)
    step(optimizer, variable, values)
    np.testing.assert_array_equal(averages_of(optimizer)[0], -values)


def test_constant_weights_are_their_own_average():
    values = np.random.default_rng(0).normal(size=20).astype("float32")
    variable = keras.Variable(values)
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.99)
    for _ in range(5):
        step(optimizer, variable, np.zeros(20))
    np.testing.assert_array_equal(averages_of(optimizer)[0], values)


def test_many_updates():
    # w_t = t: the mean of a line; 1 - mu^t computed from mu^t would be off by 1e-4 at first.
    variable = keras.Variable([0.0])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.9999)
    seen = []
    for t in range(1, 301):
        step(optimizer, variable, [-1.0])
        seen.append(t)
        if t in (2, 3, 10, 300):
            shares = 0.9999 ** np.arange(t - 1.0, -1, -1)
            expected = (shares * seen).sum() / shares.sum()
            np.testing.assert_allclose(averages_of(optimizer)[0], [expected], rtol=3e-6)


def test_long_after_the_start_it_is_the_plain_moving_average():
    variable = keras.Variable([3.0])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.9)
    optimizer.build([variable])
    optimizer.updates.assign(10_000)
    optimizer.averages[0].assign([1.0])
    step(optimizer, variable, [0.0])
    np.testing.assert_allclose(averages_of(optimizer)[0], [0.9 * 1.0 + 0.1 * 3.0], rtol=1e-6)


def test_keras_remembers_the_first_weight_instead():
    # What the docstring says of use_ema: after 100 updates 90 % of w_1, here 1 %.
    ours, theirs = keras.Variable([0.0]), keras.Variable([0.0])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.999)
    plain = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.999)
    for t in range(100):  # w_1 = 1, then 0
        gradient = [{0: -1.0, 1: 1.0}.get(t, 0.0)]
        step(optimizer, ours, gradient)
        step(plain, theirs, gradient)
    np.testing.assert_allclose(averages_of(optimizer)[0], [0.0095], atol=1e-4)
    plain.finalize_variable_values([theirs])
    np.testing.assert_allclose(numbers([theirs])[0], [0.906], atol=1e-3)


# --- real updates, and after everything else


@pytest.mark.parametrize("where", ["inside", "around"])
def test_with_an_accum_optimizer_it_counts_updates(where):
    problem = Regression(embedding=True)
    sgd = keras.optimizers.SGD(LR, momentum=0.9)
    if where == "inside":
        optimizer = ema = EMAOptimizer(AccumOptimizer(sgd, 2), 0.9)
    else:
        ema = EMAOptimizer(sgd, 0.9)
        optimizer = AccumOptimizer(ema, 2)
    fit(build(problem), problem, optimizer, 4, **JIT)
    path = path_of(problem, numpy_optimizers.sgd(LR, 0.9), batches(8))
    assert distance(averages_of(ema), mean_of(path, 0.9)) < 1e-6
    assert int(ema.updates) == 6


def test_nothing_moves_on_micro_batches():
    variable = keras.Variable([1.0])
    optimizer = EMAOptimizer(AccumOptimizer(keras.optimizers.SGD(1.0), 3), 0.5)
    seen = []
    for _ in range(6):
        step(optimizer, variable, [1.0])
        seen.append(averages_of(optimizer)[0][0])
    np.testing.assert_allclose(seen, [0, 0, 0, 0, 0, (-1 + 0.5 * 0) / 1.5], rtol=1e-6)
    assert int(optimizer.updates) == 2


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_remainder_of_accumulation_is_averaged(where):
    problem = Regression(embedding=False)
    sgd = keras.optimizers.SGD(LR)
    if where == "inside":
        optimizer = ema = EMAOptimizer(AccumOptimizer(sgd, 4), 0.5)
    else:
        ema = EMAOptimizer(sgd, 0.5)
        optimizer = AccumOptimizer(ema, 4)
    with pytest.warns(UserWarning, match="2 of 4"):
        fit(build(problem), problem, optimizer, 8)
    path = path_of(problem, numpy_optimizers.sgd(LR), [slice(0, 32), slice(32, 48)])
    assert distance(averages_of(ema), mean_of(path, 0.5)) < 1e-6


@pytest.mark.parametrize("where", ["inside", "around"])
def test_an_overflow_is_no_update(where):
    problem = Regression(embedding=False)
    problem.y[0] = np.inf
    scale = keras.optimizers.LossScaleOptimizer
    sgd = keras.optimizers.SGD(LR)
    if where == "inside":
        optimizer = ema = EMAOptimizer(scale(sgd), 0.5)
    else:
        ema = EMAOptimizer(sgd, 0.5)
        optimizer = scale(ema)
    fit(build(problem), problem, optimizer, 8)
    path = path_of(problem, numpy_optimizers.sgd(LR), batches(8)[1:])
    assert distance(averages_of(ema), mean_of(path, 0.5)) < 1e-6
    assert int(ema.updates) == 5


def test_averages_what_the_constraint_leaves():
    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint="non_neg")
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [1.0]])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.5)
    step(optimizer, layer.kernel, [[5.0], [0.0]])  # to -4, and back to 0
    np.testing.assert_array_equal(averages_of(optimizer)[0], [[0.0], [1.0]])


def test_averages_the_slow_weights_of_a_lookahead_inside():
    variable = keras.Variable([0.0])
    optimizer = EMAOptimizer(LookaheadOptimizer(keras.optimizers.SGD(1.0), 2, 0.5), 0.5)
    for _ in range(2):  # -1, then -2 goes half of the way back
        step(optimizer, variable, [1.0])
    np.testing.assert_allclose(averages_of(optimizer)[0], [-1.0], rtol=1e-6)


# --- dtypes and gradients


def test_bfloat16_weights_have_a_float32_average():
    # A hundredth of the spacing of bfloat16 is moved per update.
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = EMAOptimizer(keras.optimizers.SGD(0.0), 0.99)
    optimizer.build([variable])
    optimizer.updates.assign(10_000)
    optimizer.averages[0].assign([1.0])
    variable.assign([1.0 + 2.0**-7])
    for _ in range(20):
        step(optimizer, variable, [0.0])
    expected = 1 + 2.0**-7 * (1 - 0.99**20)
    assert optimizer.averages[0].dtype == "float32"
    np.testing.assert_allclose(averages_of(optimizer)[0], [expected], rtol=3e-7)
    optimizer.assign_averages()
    assert variable.dtype == "bfloat16"
    np.testing.assert_allclose(numbers([variable])[0], [1.0])


def test_absent_gradients():
    used, unused = keras.Variable([1.0]), keras.Variable([0.7])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        for _ in range(2):
            optimizer.apply([ops.ones(1), None], [used, unused])
    np.testing.assert_array_equal(averages_of(optimizer)[1], np.float32([0.7]))
    np.testing.assert_allclose(averages_of(optimizer)[0], [(-1 + 0.5 * 0) / 1.5], rtol=1e-6)


def test_nan_reaches_the_average():
    variable = keras.Variable([1.0])
    optimizer = EMAOptimizer(keras.optimizers.SGD(1.0), 0.5)
    step(optimizer, variable, [np.nan])
    assert np.isnan(averages_of(optimizer)[0]).all()


# --- assign_averages, state


def test_assign_averages():
    problem = Regression(embedding=False)
    model = build(problem)
    optimizer = EMAOptimizer(keras.optimizers.SGD(LR), 0.9)
    optimizer.assign_averages()  # not built: there is nothing to assign
    optimizer.build(model.trainable_variables)
    optimizer.assign_averages()  # no update: the averages are zeros
    assert distance(weights_of(model), problem.weights) == 0
    fit(model, problem, optimizer, 8, **JIT)
    averages = averages_of(optimizer)
    optimizer.assign_averages()
    assert distance(weights_of(model), averages) == 0
    # JAX reuses the memory of weights given to a step; the averages must not share it.
    model.evaluate(problem.x, problem.y, verbose=0)
    model.fit(problem.x, problem.y, batch_size=8, shuffle=False, verbose=0)
    assert all(np.isfinite(a).all() for a in averages_of(optimizer))


def test_state_is_one_float32_copy():
    variables = [keras.Variable(np.ones((3, 4)), dtype="bfloat16"), keras.Variable([1.0])]
    optimizer = EMAOptimizer(keras.optimizers.SGD(LR))
    optimizer.build(variables)
    assert [tuple(v.shape) for v in optimizer.averages] == [(3, 4), (1,)]
    assert {v.dtype for v in optimizer.averages} == {"float32"}
    assert sum(v.shape != () for v in optimizer.own_variables) == 2


def test_config_round_trip():
    optimizer = EMAOptimizer(keras.optimizers.Adam(LR), 0.99, name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
        assert copy.momentum == 0.99


def test_a_failing_fit_shows_its_own_error():
    def broken(y_true, y_pred):
        raise ZeroDivisionError("in the loss")

    problem = Regression(embedding=False)
    model = build(problem)
    model.compile(EMAOptimizer("sgd"), loss=broken)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        model.fit(problem.x, problem.y, verbose=0)


# --- two devices


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(mirrored):
    problem = Regression(embedding=True)
    with mirrored.scope():
        model = build(problem)
        optimizer = EMAOptimizer(AccumOptimizer(keras.optimizers.SGD(LR, momentum=0.9), 2), 0.9)
    fit(model, problem, optimizer, 4, jit_compile=False)
    path = path_of(problem, numpy_optimizers.sgd(LR, 0.9), batches(8))
    assert distance(weights_of(model), path[-1]) < 1e-6
    assert distance(averages_of(optimizer), mean_of(path, 0.9)) < 1e-6
    optimizer.assign_averages()
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)
    assert distance(weights_of(model), mean_of(path, 0.9)) < 1e-6


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel():
    problem = Regression(embedding=True)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        optimizer = EMAOptimizer(keras.optimizers.SGD(LR, momentum=0.9), 0.9)
        model = build(problem)
        fit(model, problem, optimizer, 8)
        assert len(optimizer.averages[0].value.sharding.device_set) == 2
        optimizer.assign_averages()
        assert len(model.weights[0].value.sharding.device_set) == 2
    finally:
        keras.distribution.set_distribution(None)
    path = path_of(problem, numpy_optimizers.sgd(LR, 0.9), batches(8))
    assert distance(weights_of(model), mean_of(path, 0.9)) < 1e-6


# --- refusals


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, 2, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(
        ValueError, match=f"momentum must be a number in \\(0, 1\\), got {momentum}"
    ):
        EMAOptimizer("sgd", momentum)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="decay"):
        EMAOptimizer("sgd", decay=0.9)


def test_nothing_outside_may_move_the_weights():
    for outer in (UpdateWrapper, LookaheadOptimizer):
        with pytest.raises(ValueError, match="goes outside"):
            outer(EMAOptimizer("sgd"))
