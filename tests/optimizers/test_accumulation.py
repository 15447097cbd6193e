"""AccumOptimizer against float64 NumPy: k micro-batches are one batch of all of them."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from reference import optimizers as numpy_optimizers
from reference.problems import OUTPUTS, VOCABULARY, WIDTH, Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import with_objective

LR = 0.05
BACKEND = keras.backend.backend()
OPTIMIZERS = {
    "momentum": (lambda **k: keras.optimizers.SGD(LR, 0.9, **k), numpy_optimizers.sgd(LR, 0.9)),
    "adam": (lambda **k: keras.optimizers.Adam(LR, **k), numpy_optimizers.adam(LR)),
    "adamw": (
        lambda **k: keras.optimizers.AdamW(LR, weight_decay=0.1, **k),
        numpy_optimizers.adam(LR, weight_decay=0.1),
    ),
    "lion": (lambda **k: keras.optimizers.Lion(LR, **k), numpy_optimizers.lion(LR)),
    "rmsprop": (lambda **k: keras.optimizers.RMSprop(LR, **k), numpy_optimizers.rmsprop(LR)),
    "adafactor": (
        lambda **k: keras.optimizers.Adafactor(LR, **k),
        numpy_optimizers.adafactor(LR),
    ),
    "lamb": (lambda **k: keras.optimizers.Lamb(LR, **k), numpy_optimizers.lamb(LR)),
}


def build(problem, dtype=None):
    """The Keras model of a Regression, starting at its weights."""
    if problem.embedding:
        inputs = keras.Input((problem.x.shape[1],), dtype="int32")
        hidden = keras.layers.Embedding(VOCABULARY, WIDTH, dtype=dtype)(inputs)
        hidden = keras.layers.GlobalAveragePooling1D(dtype=dtype)(hidden)
    else:
        inputs = hidden = keras.Input((WIDTH,), dtype=dtype)
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS, dtype=dtype)(hidden))
    for variable, value in zip(model.trainable_weights, problem.weights, strict=True):
        variable.assign(value)
    return model


def weights_of(model):
    return [ops.convert_to_numpy(w).astype("float64") for w in model.weights]


def fit(model, problem, optimizer, batch_size, epochs=1, **compile_args):
    model.compile(optimizer, loss="mse", **compile_args)
    model.fit(
        problem.x, problem.y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return weights_of(model)


def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


def thirds(problem):
    return [slice(i, i + 16) for i in range(0, len(problem.x), 16)]


def run(optimizer, problem, gradients, **arguments):
    """Feed NumPy gradients; a list of one micro-batch each."""
    variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
    for grads in gradients:
        optimizer.apply(
            [ops.convert_to_tensor(g, "float32") for g in grads], variables, **arguments
        )
    return [ops.convert_to_numpy(v).astype("float64") for v in variables]


# --- the invariant: 3 updates of 4 micro-batches of 4 rows = 3 batches of 16 rows


@pytest.mark.parametrize(
    ("embedding", "mode"),
    [(False, "eager"), (True, "eager"), (True, "xla")],
    ids=["dense, eager", "embedding, eager", "embedding, xla"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_equal_the_large_batch(name, embedding, mode):
    problem = Regression(embedding)
    make, update = OPTIMIZERS[name]
    clip = 0.5  # below every norm that occurs, so clipping acts
    expected = problem.train(
        update, thirds(problem), lambda g: numpy_optimizers.clip_global(g, clip)
    )
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    optimizer = AccumOptimizer(make(global_clipnorm=clip), 4)
    actual = fit(build(problem), problem, optimizer, batch_size=4, **compiled)
    # float32 rounding of numbers of order 1. No sum here falls near zero, so Lion's sign,
    # which turns a rounding error into 2 * LR, agrees as well.
    assert distance(actual, expected) < 2e-6
    assert int(optimizer.iterations) == 3


@pytest.fixture
def float64():
    context = contextlib.nullcontext()
    if BACKEND == "jax":
        import jax

        context = jax.enable_x64(True)
    with context:
        for dtype in ("float64", "float32"):
            keras.config.set_floatx(dtype)
            keras.config.set_dtype_policy(dtype)
            if dtype == "float64":
                yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_in_float64(name, float64):
    problem = Regression(embedding=True)
    make, update = OPTIMIZERS[name]
    micro, large = (
        fit(
            build(problem),
            problem,
            AccumOptimizer(make(), steps),
            16 // steps,
            run_eagerly=True,
        )
        for steps in (4, 1)
    )
    # On PyTorch plain SGD of Keras is off by 1e-7 as well: it goes through float32.
    assert distance(micro, large) < (1e-7 if BACKEND == "torch" else 1e-13)
    # TensorFlow rounds Python constants such as beta_1 to float32 on their way to float64.
    assert distance(micro, problem.train(update, thirds(problem))) < 2e-6


def test_one_step_is_the_inner_optimizer():
    problem = Regression(embedding=False)
    plain = fit(build(problem), problem, keras.optimizers.Adam(LR), 8)
    wrapped = fit(build(problem), problem, AccumOptimizer(keras.optimizers.Adam(LR), 1), 8)
    assert distance(plain, wrapped) < 1e-7


def test_first_adam_step_moves_every_used_token_by_the_learning_rate():
    # Keras on TensorFlow moves repeated tokens further: it squares their gradients singly.
    problem = Regression(embedding=True)
    model = build(problem)
    before = weights_of(model)[0]
    after = fit(model, problem, AccumOptimizer(keras.optimizers.Adam(LR), 2), 24)[0]
    np.testing.assert_allclose(np.abs(after - before), LR, rtol=1e-4)


# --- what sees updates and not micro-batches


def test_state_is_constant_inside_a_cycle():
    problem = Regression(embedding=False)
    inner = keras.optimizers.Adam(LR, use_ema=True)
    optimizer = AccumOptimizer(inner, 3)
    variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
    grads = [ops.convert_to_tensor(g, "float32") for g in problem.gradients(problem.weights)]
    optimizer.build(variables)

    def snapshot():
        return [ops.convert_to_numpy(v).copy() for v in variables + inner.variables]

    before = snapshot()
    for _ in range(2):
        optimizer.apply(grads, variables)
        for a, b in zip(before, snapshot(), strict=True):
            np.testing.assert_array_equal(a, b)
    optimizer.apply(grads, variables)
    assert all(np.any(a != b) for a, b in zip(before[:2], snapshot()[:2], strict=True))


def test_schedule_counts_updates():
    # s(t) = 1 / (1 + t): three updates with gradient 1 move by 1 + 1/2 + 1/3.
    schedule = keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0)
    optimizer = AccumOptimizer(keras.optimizers.SGD(schedule), 4)
    variable = keras.Variable([0.0, 0.0])
    for _ in range(12):
        optimizer.apply([ops.ones(2)], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), -(1 + 1 / 2 + 1 / 3), rtol=1e-6)


def test_moving_average_equals_that_of_large_batches():
    problem = Regression(embedding=True)
    results = []
    for steps, batch_size in ((1, 16), (4, 4)):
        inner = keras.optimizers.Adam(
            LR, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
        )
        # Overwritten with the average every 2 updates and (by Keras) at the end of fit.
        results.append(fit(build(problem), problem, AccumOptimizer(inner, steps), batch_size))
    assert distance(*results) < 1e-6
    plain = fit(build(problem), problem, AccumOptimizer(keras.optimizers.Adam(LR), 4), 4)
    assert distance(results[0], plain) > 1e-3


def test_constraint_acts_on_updates_only():
    calls = []

    class Halve(keras.constraints.Constraint):
        def __call__(self, w):
            calls.append(1)
            return w / 2

    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint=Halve())
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [1.0]])
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0), 2)
    for _ in range(4):
        optimizer.apply([ops.zeros((2, 1))], [layer.kernel])
    np.testing.assert_allclose(ops.convert_to_numpy(layer.kernel), 0.25)
    assert len(calls) == 2


def test_clips_the_mean_not_the_parts():
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=1.0), 2)
    variable = keras.Variable([0.0])
    for gradient in (1000.0, -998.0):  # the mean is 1; clipped one by one it would be 0
        optimizer.apply([ops.convert_to_tensor([gradient])], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-1.0], rtol=1e-6)


def test_absent_gradients_reach_the_inner_optimizer_as_absent():
    used, unused = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = AccumOptimizer(keras.optimizers.AdamW(LR, weight_decay=0.5), 2)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        for _ in range(2):
            optimizer.apply([ops.ones(1), None], [used, unused])
    assert ops.convert_to_numpy(unused) == [1.0]  # not even decayed
    assert ops.convert_to_numpy(used) < [1.0]


# --- unequal micro-batches


def test_weights_make_unequal_micro_batches_exact():
    problem = Regression(embedding=False, rows=10)
    parts = [slice(0, 7), slice(7, 9), slice(9, 10)]
    optimizer = AccumOptimizer(keras.optimizers.SGD(LR), 3)
    variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
    for rows in parts:
        grads = problem.gradients(problem.weights, rows)
        grads = [ops.convert_to_tensor(g, "float32") for g in grads]
        optimizer.apply(grads, variables, weight=rows.stop - rows.start)
    expected = problem.train(numpy_optimizers.sgd(LR), [slice(None)])
    assert distance([ops.convert_to_numpy(v) for v in variables], expected) < 1e-6


def test_a_micro_batch_of_weight_zero_adds_nothing_even_if_nan():
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0), 2)
    variable = keras.Variable([0.0])
    optimizer.apply([ops.convert_to_tensor([np.nan])], [variable], weight=0.0)
    optimizer.apply([ops.convert_to_tensor([2.0])], [variable], weight=5.0)
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-2.0])
    for _ in range(2):  # nothing at all came: a zero gradient, not 0 / 0
        optimizer.apply([ops.convert_to_tensor([2.0])], [variable], weight=0.0)
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-2.0])


@pytest.mark.skipif(
    BACKEND != "jax", reason="Keras's stateless_apply: refused on TensorFlow, impure on PyTorch"
)
def test_stateless_apply_takes_a_weight():
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0), 2)
    variable = keras.Variable([0.0])
    optimizer.build([variable])
    weights, state = [variable.value], [v.value for v in optimizer.variables]
    for gradient, weight in ((1.0, 3.0), (5.0, 1.0)):
        grads = [ops.convert_to_tensor([gradient])]
        weights, state = optimizer.stateless_apply(state, grads, weights, weight=weight)
    np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), [-2.0])  # (3*1 + 1*5) / 4
    assert ops.convert_to_numpy(variable) == [0.0]


@pytest.mark.parametrize("weighted", [False, True], ids=["sizes", "sample_weight"])
@pytest.mark.parametrize("jit", [False, True])
def test_unequal_micro_batches_in_fit(weighted, jit):
    problem = Regression(embedding=True, rows=16)
    row_weights = np.arange(1.0, 17.0).astype("float32") if weighted else None
    model = with_objective(build(problem), [])
    # batches of 6, 6 and 4 rows; clipping shows that the carrier is not part of the norm
    optimizer = AccumOptimizer(keras.optimizers.Adam(LR, global_clipnorm=0.5), 3)
    loss = keras.losses.MeanSquaredError(
        reduction="mean_with_sample_weight" if weighted else "sum_over_batch_size"
    )
    model.compile(optimizer, loss=loss, jit_compile=jit and BACKEND != "torch")
    history = model.fit(
        problem.x, problem.y, sample_weight=row_weights, batch_size=6, shuffle=False, verbose=0
    )
    grads = problem.gradients(problem.weights, row_weights=row_weights)
    grads = numpy_optimizers.clip_global(grads, 0.5)
    expected = numpy_optimizers.adam(LR)(problem.weights, grads, [{}, {}, {}], 1)
    assert distance(weights_of(model), expected) < 2e-6
    carrier = model.trainable_variables[-1]
    assert all(carrier is not weight for weight in model.weights)
    assert ops.convert_to_numpy(carrier) == 0.0
    assert not any("batch_weight_" in v.path for v in optimizer.inner_optimizer.variables)
    assert np.isfinite(history.history["loss"][0])


# --- unfinished cycles


@pytest.mark.parametrize("remainder", ["apply", "carry", "drop"])
def test_remainder(remainder):
    # 6 micro-batches of 8 rows, k = 4: two are left over after each of two calls of fit.
    problem = Regression(embedding=False)
    first, second = slice(0, 32), slice(32, 48)
    optimizer = AccumOptimizer(keras.optimizers.SGD(LR), 4, remainder=remainder)
    model = build(problem)
    model.compile(optimizer, loss="mse")

    def fit_once():
        with pytest.warns(UserWarning, match=f"2 of 4 micro-batches.*remainder='{remainder}'"):
            model.fit(problem.x, problem.y, batch_size=8, shuffle=False, verbose=0)

    fit_once()
    sgd = numpy_optimizers.sgd(LR)
    expected = problem.train(sgd, [first, second] if remainder == "apply" else [first])
    assert distance(weights_of(model), expected) < 1e-6
    assert int(optimizer.micro_step) == (2 if remainder == "carry" else 0)
    if remainder == "carry":  # the two at weights of before and the first two of the next fit
        then = problem.weights
        start = problem.train(sgd, [first])
        late = problem.gradients(start, second)
        early = problem.gradients(start, slice(0, 16))
        expected = [w - LR * (a + b) / 2 for w, a, b in zip(start, late, early, strict=True)]
        model.fit(problem.x[:16], problem.y[:16], batch_size=8, shuffle=False, verbose=0)
        assert distance(weights_of(model), expected) < 1e-6
        assert then is problem.weights


def test_a_finished_cycle_does_not_warn(recwarn):
    problem = Regression(embedding=False)
    fit(build(problem), problem, AccumOptimizer("sgd", 3), 16)
    assert not [w for w in recwarn if "micro-batches" in str(w.message)]


def test_the_error_of_a_failing_step_is_not_hidden():
    def broken(y_true, y_pred):
        raise ZeroDivisionError("in the loss")

    problem = Regression(embedding=False)
    model = build(problem)
    model.compile(AccumOptimizer("sgd", 2), loss=broken)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        model.fit(problem.x, problem.y, verbose=0)


# --- non-finite micro-batches


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skip_leaves_the_bad_micro_batch_out(bad):
    problem = Regression(embedding=False)
    good = [problem.gradients(problem.weights, slice(i, i + 8)) for i in (0, 8, 16)]
    poison = [np.full_like(g, bad) for g in good[0]]
    optimizer = AccumOptimizer(keras.optimizers.Adam(LR), 3, nonfinite="skip")
    actual = run(optimizer, problem, [good[0], poison, good[1], good[2]])
    expected = run(AccumOptimizer(keras.optimizers.Adam(LR), 3), problem, good)
    assert distance(actual, expected) == 0
    assert int(optimizer.skipped) == 1
    assert int(optimizer.micro_step) == 0
    assert all(np.isfinite(ops.convert_to_numpy(a)).all() for a in optimizer.accumulators)


def test_skip_in_a_compiled_fit_with_an_embedding():
    problem = Regression(embedding=True)
    problem.y[4:8] = np.nan  # the second micro-batch
    optimizer = AccumOptimizer(keras.optimizers.Adam(LR), 11, nonfinite="skip")
    actual = fit(build(problem), problem, optimizer, 4, jit_compile=BACKEND != "torch")
    rows = np.r_[0:4, 8:48]
    expected = problem.train(numpy_optimizers.adam(LR), [rows])
    assert distance(actual, expected) < 2e-6
    assert int(optimizer.skipped) == 1


def test_propagate_poisons_one_update_and_not_the_next():
    variable = keras.Variable([0.0])
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0), 2)
    for gradient in (np.nan, 1.0):
        optimizer.apply([ops.convert_to_tensor([gradient])], [variable])
    assert np.isnan(ops.convert_to_numpy(variable)).all()
    variable.assign([0.0])
    for gradient in (2.0, 4.0):
        optimizer.apply([ops.convert_to_tensor([gradient])], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-3.0])


# --- precision and loss scaling


def test_accumulates_in_float32_under_bfloat16_weights():
    # 2^-9 added to 1 is lost in bfloat16 (8 bits); 256 of them make 0.5.
    variable = keras.Variable([0.0], dtype="bfloat16")
    optimizer = AccumOptimizer(keras.optimizers.SGD(1.0), 257)
    for gradient in [1.0] + [2.0**-9] * 256:
        optimizer.apply([ops.convert_to_tensor([gradient], "bfloat16")], [variable])
    assert optimizer.accumulators[0].dtype == "float32"
    expected = ops.convert_to_numpy(ops.cast(ops.convert_to_tensor([-1.5 / 257]), "bfloat16"))
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected)


@pytest.mark.parametrize("where", ["inside", "around"])
def test_loss_scale_optimizer(where):
    problem = Regression(embedding=True)
    scale = keras.optimizers.LossScaleOptimizer
    adam = keras.optimizers.Adam(LR)
    optimizer = (
        AccumOptimizer(scale(adam), 4) if where == "inside" else scale(AccumOptimizer(adam, 4))
    )
    actual = fit(build(problem), problem, optimizer, 4)
    expected = problem.train(numpy_optimizers.adam(LR), thirds(problem))
    assert distance(actual, expected) < 2e-6
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("where", ["inside", "around"])
def test_overflow_halves_the_scale(where):
    problem = Regression(embedding=False)
    problem.y[0] = np.inf  # the first of 12 micro-batches
    scaled = keras.optimizers.LossScaleOptimizer
    if where == "inside":  # the cycle of the overflow is lost
        optimizer = AccumOptimizer(scaled(keras.optimizers.SGD(LR)), 4)
        scale = optimizer.inner_optimizer
        rest = [slice(16, 32), slice(32, 48)]
    else:  # the micro-batch of the overflow is lost; 11 are left for cycles of 4, 4 and 3
        optimizer = scale = scaled(
            AccumOptimizer(keras.optimizers.SGD(LR), 4, remainder="drop")
        )
        rest = [slice(4, 20), slice(20, 36)]
    model = build(problem)
    model.compile(optimizer, loss="mse")
    if where == "inside":
        model.fit(problem.x, problem.y, batch_size=4, shuffle=False, verbose=0)
    else:
        with pytest.warns(UserWarning, match="3 of 4 micro-batches"):
            model.fit(problem.x, problem.y, batch_size=4, shuffle=False, verbose=0)
    assert float(ops.convert_to_numpy(scale.dynamic_scale)) == 2.0**14
    assert distance(weights_of(model), problem.train(numpy_optimizers.sgd(LR), rest)) < 1e-6


def test_mixed_float16_compiles_and_trains():
    problem = Regression(embedding=True)
    optimizer = AccumOptimizer(keras.optimizers.Adam(LR), 4)
    before = problem.weights
    after = fit(build(problem, dtype="mixed_float16"), problem, optimizer, 4)
    expected = problem.train(numpy_optimizers.adam(LR), thirds(problem))
    assert distance(after, expected) < 5e-3  # half-precision activations
    assert distance(after, before) > LR
    assert {a.dtype for a in optimizer.accumulators} == {"float32"}


# --- saving


class StopAfter(keras.callbacks.Callback):
    def __init__(self, batches, save=None):
        super().__init__()
        self.batches, self.save = batches, save

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.batches:
            if self.save:
                self.model.save(self.save)
            self.model.stop_training = True


def test_saved_in_mid_cycle_it_resumes_bit_for_bit(tmp_path):
    problem = Regression(embedding=True)
    whole = build(problem)
    fit(whole, problem, AccumOptimizer(keras.optimizers.Adam(LR), 4), 4)
    model = build(problem)
    model.compile(AccumOptimizer(keras.optimizers.Adam(LR), 4, remainder="drop"), loss="mse")
    path = tmp_path / "mid.keras"
    with pytest.warns(UserWarning, match="2 of 4"):
        model.fit(
            problem.x,
            problem.y,
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=[StopAfter(6, path)],
        )
    resumed = keras.saving.load_model(path)
    assert int(resumed.optimizer.micro_step) == 2
    resumed.fit(problem.x[24:], problem.y[24:], batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        whole.optimizer.inner_optimizer.variables,
        resumed.optimizer.inner_optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_backup_and_restore_in_mid_cycle(tmp_path):
    # 6 micro-batches an epoch, k = 4: the epoch ends in the middle of the second cycle.
    problem = Regression(embedding=True)

    def train(epochs, **arguments):
        model = build(problem)
        model.compile(
            AccumOptimizer(keras.optimizers.Adam(LR), 4, remainder="carry"), loss="mse"
        )
        fit_args = {"batch_size": 8, "shuffle": False, "verbose": 0} | arguments
        model.fit(problem.x, problem.y, epochs=epochs, **fit_args)
        return model

    class Crash(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise InterruptedError

    whole = train(2)
    backup = keras.callbacks.BackupAndRestore(str(tmp_path))
    with warnings.catch_warnings(), pytest.raises(InterruptedError):
        warnings.simplefilter("ignore")  # only the JAX trainer ends a failed fit in order
        train(2, callbacks=[backup, Crash()])
    resumed = train(2, callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path))])
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inner_state_is_saved_once(tmp_path):
    h5py = pytest.importorskip("h5py")
    problem = Regression(embedding=False)
    model = build(problem)
    fit(model, problem, AccumOptimizer(keras.optimizers.Adam(LR), 2), 8)
    model.save_weights(tmp_path / "m.weights.h5")
    sizes = []
    with h5py.File(tmp_path / "m.weights.h5") as f:
        f["optimizer"].visititems(
            lambda _, d: sizes.append(d.size) if hasattr(d, "size") else None
        )
    parameters = sum(w.size for w in problem.weights)
    # m, v, the accumulator, and for each weight whether it had a gradient.
    assert sum(s for s in sizes if s > 1) == 3 * parameters + len(problem.weights)


def test_config_round_trip():
    inner = keras.optimizers.AdamW(1e-3, weight_decay=0.01, global_clipnorm=1.0)
    optimizer = AccumOptimizer(inner, 4, remainder="carry", nonfinite="skip", name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):  # from_config must not eat the dictionary
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
        assert isinstance(copy.inner_optimizer, keras.optimizers.AdamW)


def test_learning_rate_is_the_inner_one():
    optimizer = AccumOptimizer(keras.optimizers.SGD(0.5), 2)
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    assert float(optimizer.learning_rate) == 0.25


def test_set_weights_sets_the_inner_state_too():
    a, b = (AccumOptimizer(keras.optimizers.Adam(LR), 2) for _ in range(2))
    variable = keras.Variable([0.0])
    a.apply([ops.ones(1)], [variable])
    b.build([variable])
    b.set_weights([ops.convert_to_numpy(v) for v in a.variables])
    for x, y in zip(a.variables, b.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(x), ops.convert_to_numpy(y))


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accum_steps": 0}, "accum_steps must be an integer >= 1, got 0"),
        ({"accum_steps": 2.0}, "accum_steps must be an integer >= 1, got 2.0"),
        ({"accum_steps": True}, "accum_steps must be an integer >= 1, got True"),
        ({"accum_steps": 2, "remainder": "flush"}, "remainder must be one of .*got 'flush'"),
        ({"accum_steps": 2, "nonfinite": "zero"}, "nonfinite must be one of .*got 'zero'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AccumOptimizer("sgd", **arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="clipnorm"):
        AccumOptimizer("sgd", 2, clipnorm=1.0)


def test_accumulating_twice_is_refused():
    with pytest.raises(ValueError, match="already accumulates"):
        AccumOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=2), 2)
    with pytest.raises(ValueError, match="already accumulates"):
        AccumOptimizer(keras.optimizers.LossScaleOptimizer(AccumOptimizer("sgd", 2)), 2)


def test_skipping_around_a_loss_scale_is_refused():
    with pytest.raises(ValueError, match="scale could then never fall"):
        AccumOptimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), 2, nonfinite="skip"
        )


def test_gradients_must_match_the_variables():
    optimizer = AccumOptimizer("sgd", 2)
    with pytest.raises(ValueError, match="not built yet"):
        optimizer.apply([ops.ones(1)])
    with pytest.raises(ValueError, match="2 entries for 1 variables"):
        optimizer.apply([ops.ones(1), ops.ones(1)], [keras.Variable([0.0])])
