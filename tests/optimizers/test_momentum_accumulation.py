"""Accumulation in the moments against float64 NumPy, and the law of what is not exact."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import (
    LR,
    build,
    distance,
    fit,
    run,
    thirds,
    weights_of,
)
from reference import momentum_accumulation as numpy_hidden
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer, OptimizerWrapper, Tiger
from keras_ext.optimizers.momentum_accumulation import (
    MomentumAccumAdam,
    MomentumAccumAdamW,
    MomentumAccumLamb,
    MomentumAccumSGD,
)

BACKEND = keras.backend.backend()
MU = 0.9
OPTIMIZERS = {
    "sgd": lambda k, **a: MomentumAccumSGD(LR, MU, k, **a),
    "adam": lambda k, **a: MomentumAccumAdam(LR, k, **a),
    "adamw": lambda k, **a: MomentumAccumAdamW(LR, k, weight_decay=0.1, **a),
    "lamb": lambda k, **a: MomentumAccumLamb(LR, k, **a),
    "tiger": lambda k, **a: Tiger(LR, k, **a),
}
KERAS = {  # of the same state and, for k = 1, the same weights
    "sgd": lambda **a: keras.optimizers.SGD(LR, MU, **a),
    "adam": lambda **a: keras.optimizers.Adam(LR, **a),
    "adamw": lambda **a: keras.optimizers.AdamW(LR, weight_decay=0.1, **a),
    "lamb": lambda **a: keras.optimizers.Lamb(LR, **a),
}
HIDDEN = {
    "adam": lambda k: numpy_hidden.hidden_adam(LR, k),
    "adamw": lambda k: numpy_hidden.hidden_adam(LR, k, weight_decay=0.1),
    "lamb": lambda k: numpy_hidden.hidden_lamb(LR, k),
}
modes = pytest.mark.parametrize("mode", ["eager", "compiled"])
problems = pytest.mark.parametrize(
    ("embedding", "mode"),
    [(True, "eager"), (False, "compiled"), (True, "compiled")],
    ids=["embedding, eager", "dense, compiled", "embedding, compiled"],
)
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
two_optimizers = pytest.mark.parametrize("name", ["adamw", "tiger"])  # what all share


def compiled(mode):
    # On torch jit_compile means torch.compile, which needs minutes.
    return {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}


def quarters(problem):
    return [slice(i, i + 4) for i in range(0, len(problem.x), 4)]


def numpy(variables):
    return [ops.convert_to_numpy(v).copy() for v in variables]


def apply(optimizer, variable, *gradients):
    for gradient in gradients:
        gradient = np.broadcast_to(np.asarray(gradient, "float32"), variable.shape)
        optimizer.apply([ops.convert_to_tensor(gradient.copy(), variable.dtype)], [variable])
    return ops.convert_to_numpy(variable)


# --- exact: 3 updates of 4 micro-batches of 4 rows = 3 batches of 16 rows


@problems
def test_sgd_equals_the_large_batch(embedding, mode):
    problem, schedule = Regression(embedding), mode == "compiled"
    rate = keras.optimizers.schedules.InverseTimeDecay(LR, 1, 1.0) if schedule else LR

    def update(weights, grads, state, t):
        sgd = numpy_optimizers.sgd(LR / t if schedule else LR, MU)
        return sgd(weights, grads, state, t)

    optimizer = MomentumAccumSGD(rate, MU, 4)
    actual = fit(build(problem), problem, optimizer, 4, **compiled(mode))
    assert distance(actual, problem.train(update, thirds(problem))) < 1e-6
    assert int(optimizer.iterations) == 3


@problems
def test_tiger_equals_the_large_batch(embedding, mode):
    problem = Regression(embedding)
    kinds = ["rows", "matrix", "vector"] if embedding else ["matrix", "vector"]
    expected = problem.train(numpy_hidden.tiger(LR, kinds), thirds(problem))
    actual = fit(build(problem), problem, Tiger(LR, 4), 4, **compiled(mode))
    # No sum of gradients here falls near zero, so the signs agree.
    assert distance(actual, expected) < 1e-6


def test_sgd_equals_the_large_batch_in_float64():
    context = contextlib.nullcontext()
    if BACKEND == "jax":
        import jax

        context = jax.enable_x64(True)
    problem, rate = Regression(embedding=True), 2.0**-4  # a rate that float32 holds
    with context:
        variables = [keras.Variable(w, dtype="float64") for w in problem.weights]
        optimizer = MomentumAccumSGD(rate, MU, 4)
        for rows in quarters(problem):
            grads = problem.gradients(numpy(variables), rows)
            optimizer.apply([ops.convert_to_tensor(g, "float64") for g in grads], variables)
        assert {m.dtype for m in optimizer.momentums} == {"float64"}
        actual = numpy(variables)
    expected = problem.train(numpy_optimizers.sgd(rate, MU), thirds(problem))
    assert distance(actual, expected) < 1e-14


@pytest.mark.parametrize(
    ("name", "decay"), [("sgd", None), ("adam", None), ("adamw", None), ("lamb", 0.1)]
)
def test_one_step_is_the_keras_optimizer(name, decay, tmp_path):
    problem = Regression(embedding=False)
    arguments = {} if name == "adamw" else {"weight_decay": decay}
    plain = fit(build(problem), problem, KERAS[name](**arguments), 4)
    model = build(problem)
    ours = fit(model, problem, OPTIMIZERS[name](1, **arguments), 4)
    # 12 updates of numbers of order 1; only the order of the roundings differs
    assert distance(plain, ours) < 1e-6
    half = slice(0, 24)
    model = build(problem)
    model.compile(OPTIMIZERS[name](1, **arguments), loss="mse")
    model.fit(problem.x[half], problem.y[half], batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "half.keras")
    model = keras.saving.load_model(tmp_path / "half.keras")
    model.fit(problem.x[24:], problem.y[24:], batch_size=4, shuffle=False, verbose=0)
    assert distance(weights_of(model), ours) == 0


# --- approximate: what the second moment is, and how far it is from exact


@problems
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_second_moment_equals_its_formula(name, embedding, mode):
    problem = Regression(embedding)
    expected = problem.train(HIDDEN[name](4), quarters(problem))
    actual = fit(build(problem), problem, OPTIMIZERS[name](4), 4, **compiled(mode))
    assert distance(actual, expected) < 2e-6


def test_adam_takes_one_rate_of_a_schedule_per_update():
    problem = Regression(embedding=False)
    schedule = keras.optimizers.schedules.InverseTimeDecay(LR, 1, 1.0)
    actual = fit(build(problem), problem, MomentumAccumAdam(schedule, 4), 4)
    update = numpy_hidden.hidden_adam(lambda u: LR / u, 4)
    assert distance(actual, problem.train(update, quarters(problem))) < 2e-6


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
def test_equal_micro_gradients_make_it_exact(name):
    problem = Regression(embedding=False)
    rng = np.random.default_rng(1)
    batches = [[rng.normal(size=w.shape) for w in problem.weights] for _ in range(3)]
    repeated = [grads for grads in batches for _ in range(4)]
    hidden = run(OPTIMIZERS[name](4), problem, repeated)
    exact = run(AccumOptimizer(KERAS[name](), 4), problem, repeated)
    assert distance(hidden, exact) < 1e-6


def second_moments(k, gradients):
    """v of the hidden and of the exact Adam after the cycle, beta_2 = 1/2, one moment each."""
    hidden = MomentumAccumAdam(LR, k, beta_2=0.5)
    exact = AccumOptimizer(keras.optimizers.Adam(LR, beta_2=0.5), k)
    shape = gradients[0].shape
    for optimizer in (hidden, exact):
        variable = keras.Variable(np.zeros(shape, "float32"))
        for g in gradients:
            optimizer.apply([ops.convert_to_tensor(g)], [variable])
    v_exact = next(v for v in exact.inner_optimizer.variables if "velocity" in v.path)
    return ops.convert_to_numpy(hidden.velocities[0]), ops.convert_to_numpy(v_exact)


@pytest.mark.parametrize(
    ("k", "mu", "sigma"),
    [(2, 0.0, 1.0), (4, 0.0, 2.0), (16, 0.0, 1.0), (4, 1.0, 1.0), (4, 3.0, 1.0)],
)
def test_law_of_the_second_moment(k, mu, sigma):
    n = 100_000
    gradients = np.random.default_rng(k).normal(mu, sigma, (k, n)).astype("float32")
    hidden, exact = second_moments(k, gradients)
    law = (mu**2 + sigma**2) / (mu**2 + sigma**2 / k)

    def error(s2):  # relative deviation of the mean of n squares of N(mu, s2)
        return np.sqrt((4 * mu**2 * s2 + 2 * s2**2) / n) / (mu**2 + s2)

    tolerance = 5 * np.hypot(error(sigma**2) / np.sqrt(k), error(sigma**2 / k))
    assert tolerance < 0.05
    assert hidden.mean() / exact.mean() == pytest.approx(law, rel=tolerance)


def test_second_moment_is_never_smaller():
    k, cycles = 4, 5
    gradients = np.random.default_rng(0).normal(size=(k * cycles, 1000)).astype("float32")
    gradients[:, :500] += 1.0
    hidden, exact = second_moments(k, gradients)
    assert np.all(hidden >= exact * (1 - 1e-6))
    assert np.mean(hidden > 2 * exact) > 0.1
    opposite = np.array([[1.0], [-1.0]], "float32")  # no bound for a single history
    hidden, exact = second_moments(2, opposite)
    assert exact == 0.0
    assert hidden == 0.5


def test_first_adam_update_is_the_sign_of_the_gradient():
    variable = keras.Variable([0.0, 0.0, 0.0])
    moved = apply(MomentumAccumAdam(LR, 4, epsilon=1e-30), variable, *[[1e-3, -2.0, 50.0]] * 4)
    np.testing.assert_allclose(moved, [-LR, LR, -LR], rtol=1e-5)


@pytest.mark.parametrize("name", ["lamb", "adam"])
def test_uniform_excess_of_the_second_moment_cancels_in_lamb_only(name):
    rng = np.random.default_rng(0)
    start, gradient = rng.normal(size=(2, 6)).astype("float32")
    results = []
    for excess in (1.0, 9.0):
        optimizer = OPTIMIZERS[name](2, epsilon=0.0)
        variable = keras.Variable(start)
        apply(optimizer, variable, gradient)
        optimizer.velocities[0].assign(optimizer.velocities[0] * excess)
        results.append(apply(optimizer, variable, 0.0) - start)
    plain, inflated = results
    np.testing.assert_allclose(inflated, plain if name == "lamb" else plain / 3, rtol=1e-4)


# --- what sees updates and not micro-batches


@all_optimizers
def test_weights_are_constant_inside_a_cycle(name):
    problem = Regression(embedding=False)
    grads = problem.gradients(problem.weights)
    optimizer = OPTIMIZERS[name](3)
    variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
    tensors = [ops.convert_to_tensor(g, "float32") for g in grads]
    optimizer.build(variables)
    for updates in range(2):
        before = numpy(variables)
        for step in range(3):
            assert int(optimizer.micro_step) == step
            assert int(optimizer.iterations) == updates
            assert distance(before, numpy(variables)) == 0
            optimizer.apply(tensors, variables)
        assert all(np.all(a != b) for a, b in zip(before, numpy(variables), strict=True))


@pytest.mark.parametrize("name", KERAS)
def test_decays_once_per_update(name):
    arguments = {} if name == "adamw" else {"weight_decay": 0.1}
    variable = keras.Variable([1.0, 2.0])
    apply(OPTIMIZERS[name](4, **arguments), variable, *[0.0] * 12)
    expected = np.array([1.0, 2.0]) * (1 - LR * 0.1) ** 3
    np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=1e-6)


def test_tiger_decays_once_per_update():
    variable = keras.Variable([[3.0, 3.0]])
    apply(Tiger(LR, 4, weight_decay=0.1), variable, *[0.0] * 12)
    w = 3.0
    for _ in range(3):
        w -= LR * w * 0.1 * w  # the rate is relative to the weights
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [[w, w]], rtol=1e-6)


@all_optimizers
def test_excluded_from_weight_decay(name):
    kept, decayed = keras.Variable([[1.0]], name="kept"), keras.Variable([[1.0]], name="other")
    arguments = {} if name == "adamw" else {"weight_decay": 0.1}
    optimizer = OPTIMIZERS[name](1, **arguments)
    optimizer.exclude_from_weight_decay(var_names=["kept"])
    optimizer.apply([ops.zeros((1, 1))] * 2, [kept, decayed])
    assert ops.convert_to_numpy(kept) == 1.0
    assert ops.convert_to_numpy(decayed) == pytest.approx(1 - LR * 0.1)


def test_constraint_acts_on_updates_only():
    calls = []

    class Halve(keras.constraints.Constraint):
        def __call__(self, w):
            calls.append(1)
            return w / 2

    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint=Halve())
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [1.0]])
    apply(MomentumAccumSGD(1.0, MU, 2), layer.kernel, *[0.0] * 4)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.kernel), 0.25)
    assert len(calls) == 2


def test_rate_set_in_mid_cycle_counts_from_there():
    optimizer = MomentumAccumSGD(1.0, 0.5, 2)
    variable = keras.Variable([0.0])
    apply(optimizer, variable, 1.0)
    optimizer.learning_rate = 3.0
    np.testing.assert_allclose(apply(optimizer, variable, 1.0), [-(1.0 + 3.0) / 2])


# --- state


@pytest.mark.parametrize("name", [*KERAS, "tiger"])
def test_state_is_that_of_keras_and_one_counter(name):
    variables = [keras.Variable(w, dtype="float32") for w in Regression(True).weights]

    def sizes(optimizer):
        optimizer.build(variables)
        return sorted((v.dtype, tuple(v.shape)) for v in optimizer.variables)

    same_state = KERAS.get(name, lambda: keras.optimizers.SGD(LR, MU))
    ours, keras_sizes = sizes(OPTIMIZERS[name](8)), sizes(same_state())
    counter = [(same_state().iterations.dtype, ()), ("bool", (len(variables),))]
    assert ours == sorted(keras_sizes + counter)


def test_the_error_of_a_failing_step_is_not_hidden():
    def broken(y_true, y_pred):
        raise ZeroDivisionError("in the loss")

    problem = Regression(embedding=False)
    model = build(problem)
    model.compile(MomentumAccumSGD(LR, MU, 2), loss=broken)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        model.fit(problem.x, problem.y, verbose=0)


@pytest.mark.parametrize("square", [False, True], ids=["first", "second"])
def test_moments_are_float32_under_bfloat16_weights(square):
    # 2^-9 added to 1 is lost in bfloat16 (8 bits); 256 of them make 0.5.
    variable = keras.Variable([0.0], dtype="bfloat16")
    small = 2.0**-9
    if square:
        optimizer = MomentumAccumAdam(0.0, 257, beta_2=0.5)
        apply(optimizer, variable, 1.0, *[2.0**-4] * 128, *[0.0] * 128)  # squares: 2^-8
        v = ops.convert_to_numpy(optimizer.velocities[0])
        np.testing.assert_allclose(v, 0.5 * 1.5 / 257, rtol=1e-5)
    else:
        optimizer = MomentumAccumSGD(1.0, MU, 257)
        actual = apply(optimizer, variable, 1.0, *[small] * 256)
        expected = ops.cast(ops.convert_to_tensor([-1.5 / 257]), "bfloat16")
        np.testing.assert_array_equal(actual, ops.convert_to_numpy(expected))
    assert {m.dtype for m in optimizer.momentums} == {"float32"}
    assert variable.dtype == "bfloat16"


# --- gradients that are absent or not finite, and loss scaling


@all_optimizers
def test_absent_gradients(name):
    used, unused = keras.Variable([[1.0]]), keras.Variable([[1.0]])
    arguments = {} if name == "adamw" else {"weight_decay": 0.5}
    optimizer = OPTIMIZERS[name](2, **arguments)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        for _ in range(2):
            optimizer.apply([ops.ones((1, 1)), None], [used, unused])
    assert ops.convert_to_numpy(unused) == 1.0  # not even decayed
    assert ops.convert_to_numpy(used) < 1.0
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None, None], [used, unused])


def test_a_gradient_absent_once_counts_as_zero():
    a, b = keras.Variable([0.0]), keras.Variable([0.0])
    optimizer = MomentumAccumSGD(1.0, MU, 2)
    optimizer.apply([ops.ones(1), ops.ones(1)], [a, b])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([ops.ones(1), None], [a, b])
    assert ops.convert_to_numpy(a) == -1.0
    assert ops.convert_to_numpy(b) == -0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tiger_shrinks_and_waits_where_a_gradient_is_not_finite(bad):
    layer = keras.layers.LayerNormalization()
    layer.build((None, 2))
    layer.gamma.assign([3.0, 3.0])
    layer.beta.assign([2.0, 2.0])
    good = keras.Variable([[2.0, -2.0]], name="kernel")
    optimizer, variables = Tiger(0.1, weight_decay=0.0), [layer.gamma, layer.beta, good]
    ones = [ops.ones(v.shape) for v in variables]
    optimizer.apply(ones, variables)
    before = numpy([layer.gamma, layer.beta]) + numpy(optimizer.momentums)
    poison = ops.convert_to_tensor(np.array([1.0, bad], "float32"))
    optimizer.apply([poison, poison, ones[2]], variables)
    gamma, beta, m_gamma, m_beta, m_good = before
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.gamma), 1 + 0.99 * (gamma - 1), rtol=1e-6
    )
    np.testing.assert_allclose(ops.convert_to_numpy(layer.beta), 0.99 * beta, rtol=1e-6)
    np.testing.assert_array_equal(ops.convert_to_numpy(optimizer.momentums[0]), m_gamma)
    np.testing.assert_array_equal(ops.convert_to_numpy(optimizer.momentums[1]), m_beta)
    assert np.all(ops.convert_to_numpy(optimizer.momentums[2]) > m_good)


def test_tiger_shrinks_in_mid_cycle_the_bad_variable_alone():
    bad, good = keras.Variable([[2.0]], name="a"), keras.Variable([[2.0]], name="b")
    optimizer = Tiger(0.1, 3, weight_decay=0.0)
    one, nan = ops.ones((1, 1)), ops.full((1, 1), np.nan)
    optimizer.apply([nan, one], [bad, good])
    np.testing.assert_allclose(np.ravel(numpy([bad, good])), [0.99 * 2, 2], rtol=1e-6)
    assert int(optimizer.micro_step) == 1
    assert int(optimizer.iterations) == 0
    for _ in range(2):
        optimizer.apply([one, one], [bad, good])
    expected = [0.9 * 0.99 * 2, 0.9 * 2]
    np.testing.assert_allclose(np.ravel(numpy([bad, good])), expected, rtol=1e-6)
    assert int(optimizer.iterations) == 1


@modes
def test_tiger_leaves_a_bad_micro_batch_out(mode):
    problem = Regression(embedding=False, rows=16)
    problem.y[4] = np.nan  # the second of four micro-batches
    start = [0.99 * w for w in problem.weights]
    grads = [problem.gradients(problem.weights, slice(0, 4))]
    grads += [problem.gradients(start, rows) for rows in (slice(8, 12), slice(12, 16))]
    mean = [sum(g) / 4 for g in zip(*grads, strict=True)]
    expected = numpy_hidden.tiger(LR, ["matrix", "vector"])(start, mean, [{}, {}], 1)
    actual = fit(build(problem), problem, Tiger(LR, 4), 4, **compiled(mode))
    assert distance(actual, expected) < 1e-6


def test_tiger_knows_its_variables():
    layer = keras.layers.Dense(2)
    layer.build((None, 2))
    layer.kernel.assign([[3.0, 4.0], [0.0, 0.0]])
    table = keras.layers.Embedding(2, 2)
    table.build()
    table.embeddings.assign([[3.0, 4.0], [0.0, 0.0]])
    variables = [layer.kernel, layer.bias, table.embeddings]
    before = numpy(variables)
    optimizer = Tiger(0.1, weight_decay=0.0)
    optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    kernel, bias, rows = (b - a for a, b in zip(numpy(variables), before, strict=True))
    np.testing.assert_allclose(kernel, 0.1 * np.sqrt(25 / 4), rtol=1e-6)
    np.testing.assert_allclose(bias, 0.05, rtol=1e-6)
    np.testing.assert_allclose(rows, [[0.1 * np.sqrt(25 / 2)] * 2, [0, 0]], rtol=1e-6)


@pytest.mark.thorough
@two_optimizers
def test_inside_a_loss_scale_optimizer(name):
    problem = Regression(embedding=True)
    plain = fit(build(problem), problem, OPTIMIZERS[name](4), 4)
    scaled = keras.optimizers.LossScaleOptimizer(OPTIMIZERS[name](4))
    assert distance(fit(build(problem), problem, scaled, 4), plain) < 1e-6
    assert int(scaled.iterations) == 3


def test_an_overflow_does_not_advance_the_cycle():
    problem = Regression(embedding=False)
    problem.y[0] = np.inf  # the first of 12 micro-batches; 11 are left for 4, 4 and 3
    scaled = keras.optimizers.LossScaleOptimizer(MomentumAccumSGD(LR, MU, 4))
    model = build(problem)
    model.compile(scaled, loss="mse")
    with pytest.warns(UserWarning, match="3 of 4 micro-batches"):
        model.fit(problem.x, problem.y, batch_size=4, shuffle=False, verbose=0)
    assert float(ops.convert_to_numpy(scaled.dynamic_scale)) == 2.0**14
    expected = problem.train(numpy_optimizers.sgd(LR, MU), [slice(4, 20), slice(20, 36)])
    assert distance(weights_of(model), expected) < 1e-6


@two_optimizers
def test_constant_loss_scale(name):
    problem = Regression(embedding=True)
    plain = fit(build(problem), problem, OPTIMIZERS[name](4), 4)
    scaled = fit(build(problem), problem, OPTIMIZERS[name](4, loss_scale_factor=64.0), 4)
    assert distance(plain, scaled) < 1e-6


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(dtype):
    problem = Regression(embedding=True)
    optimizer = MomentumAccumSGD(LR, MU, 4)
    actual = fit(build(problem, dtype=dtype), problem, optimizer, 4)
    expected = problem.train(numpy_optimizers.sgd(LR, MU), thirds(problem))
    assert distance(actual, expected) < (2e-3 if dtype == "mixed_float16" else 2e-2)
    assert distance(actual, problem.weights) > LR


# --- inside wrappers, and on two devices


class Passing(OptimizerWrapper):
    """The least that a wrapper does."""

    def update(self, grads):
        self.step_inner(grads)


@two_optimizers
def test_inside_a_wrapper(name):
    problem = Regression(embedding=True)
    plain = fit(build(problem), problem, OPTIMIZERS[name](4), 4, **compiled("compiled"))
    wrapper = Passing(OPTIMIZERS[name](4))
    wrapped = fit(build(problem), problem, wrapper, 4, **compiled("compiled"))
    assert distance(plain, wrapped) < 1e-6
    assert int(wrapper.iterations) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cycles_of_cycles_are_refused(name):
    with pytest.raises(ValueError, match="already accumulates gradients"):
        AccumOptimizer(OPTIMIZERS[name](4), 4)
    AccumOptimizer(OPTIMIZERS[name](1), 4)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize(
    ("name", "around"), [("adamw", Passing), ("tiger", keras.optimizers.LossScaleOptimizer)]
)
def test_mirrored_strategy(mirrored, name, around):
    # Two replicas, each 4 of the 8 rows of a micro-batch: what is squared is their mean.
    problem = Regression(embedding=True)
    with mirrored.scope():
        model = build(problem)
        optimizer = OPTIMIZERS[name](3)
        optimizer = around(optimizer)
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single = fit(build(problem), problem, OPTIMIZERS[name](3), 8)
    assert distance(distributed, single) < 1e-6
    assert ops.convert_to_numpy(optimizer.iterations) == 2
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
@two_optimizers
def test_data_parallel(name):
    problem = Regression(embedding=True)
    single = fit(build(problem), problem, OPTIMIZERS[name](3), 8)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        optimizer = OPTIMIZERS[name](3)
        distributed = fit(build(problem), problem, optimizer, 8)
        assert len(optimizer.momentums[0].value.sharding.device_set) == 2
        assert distance(distributed, single) < 1e-6
    finally:
        keras.distribution.set_distribution(None)


# --- configuration and refusals


@all_optimizers
@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
def test_config_round_trip(name, schedule):
    optimizer = OPTIMIZERS[name](4, name="mine", loss_scale_factor=2.0)
    if schedule:
        optimizer.learning_rate = keras.optimizers.schedules.InverseTimeDecay(LR, 1, 1.0)
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):
        copy = keras.saving.deserialize_keras_object(config)
        assert type(copy) is type(optimizer)
        assert copy.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("nesterov", True, "use AccumOptimizer"),
        ("clipnorm", 1.0, "AccumOptimizer.ClipOptimizer.*every micro-batch put ClipOptimizer"),
        ("clipvalue", 1.0, "ClipOptimizer"),
        ("global_clipnorm", 1.0, "ClipOptimizer"),
        ("amsgrad", True, "excess of the second moment for ever"),
        ("use_ema", True, "EMAOptimizer around"),
        ("gradient_accumulation_steps", 4, "is accum_steps here"),
    ],
)
@all_optimizers
def test_refused_with_the_reason(name, argument, value, advice):
    with pytest.raises(ValueError, match=f"{argument}={value}.*{advice}"):
        OPTIMIZERS[name](4, **{argument: value})
    OPTIMIZERS[name](4, **{argument: None})  # as in the configuration of a Keras optimizer
    with pytest.raises(TypeError, match="no argument 'no_such_option'"):
        OPTIMIZERS[name](4, no_such_option=1)


@all_optimizers
@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_accum_steps_must_count(name, steps):
    with pytest.raises(ValueError, match=f"accum_steps must be an integer >= 1, got {steps}"):
        OPTIMIZERS[name](steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MomentumAccumSGD(LR, 0.0, 4), "got 0. Without momentum.*use AccumOptimizer"),
        (
            lambda: MomentumAccumSGD(LR, 1.0, 4),
            r"momentum must be .* \(0, 1\), got 1.0",
        ),
        (
            lambda: MomentumAccumAdam(LR, 4, beta_1=1.0),
            r"beta_1 must be .* \[0, 1\), got 1.0",
        ),
        (
            lambda: MomentumAccumLamb(LR, 4, beta_2=-0.1),
            r"beta_2 must be a number in \[0, 1\), got -0.1",
        ),
        (
            lambda: MomentumAccumAdam(LR, 4, epsilon=-1.0),
            r"epsilon must be .* >= 0, got -1.0",
        ),
        (lambda: MomentumAccumAdamW(LR, 4, weight_decay=None), "must be a float, got None"),
        (lambda: Tiger(LR, beta=1.5), r"beta must be a number in \[0, 1\), got 1.5"),
        (lambda: Tiger(LR, shrink=0.0), r"shrink must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_float8_scales_are_refused():
    variable = keras.Variable([1.0])
    variable.overwrite_with_gradient = True
    with pytest.raises(ValueError, match="takes its gradient as its value"):
        MomentumAccumSGD(LR, MU, 2).build([variable])


def test_gradients_must_match_the_variables():
    optimizer = MomentumAccumSGD(LR, MU, 2)
    with pytest.raises(ValueError, match="not built yet"):
        optimizer.apply([ops.ones(1)])
    with pytest.raises(ValueError, match="2 entries for 1 variables"):
        optimizer.apply([ops.ones(1), ops.ones(1)], [keras.Variable([0.0])])
