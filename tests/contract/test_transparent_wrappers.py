"""A wrapper that changes nothing behaves as the optimizer that it wraps, whatever a user does.

The reference is the optimizer of Keras alone, doing the same.
"""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import optimizers
from keras_ext.optimizers.wrapper import KERAS_SAYS_NOTHING

BACKEND = keras.backend.backend()
JIT = BACKEND != "torch"  # there it means torch.compile, which needs minutes
LR = 0.05

OPTIMIZERS = {
    "Adadelta": lambda: keras.optimizers.Adadelta(LR),
    "Adafactor": lambda: keras.optimizers.Adafactor(LR),
    "Adagrad": lambda: keras.optimizers.Adagrad(LR),
    "Adam": lambda: keras.optimizers.Adam(LR, amsgrad=True),
    "Adamax": lambda: keras.optimizers.Adamax(LR, clipvalue=0.5),
    "AdamW": lambda: keras.optimizers.AdamW(LR, weight_decay=0.1, global_clipnorm=1.0),
    "Ftrl": lambda: keras.optimizers.Ftrl(LR),
    "Lamb": lambda: keras.optimizers.Lamb(LR),
    "Lion": lambda: keras.optimizers.Lion(LR, weight_decay=0.1),
    "Muon": lambda: keras.optimizers.Muon(LR, weight_decay=0.1),
    "Nadam": lambda: keras.optimizers.Nadam(LR),
    "RMSprop": lambda: keras.optimizers.RMSprop(LR, momentum=0.5, centered=True),
    "SGD": lambda: keras.optimizers.SGD(LR, clipnorm=0.5),
    "SGD momentum": lambda: keras.optimizers.SGD(LR, momentum=0.9, use_ema=True),
    "SGD nesterov": lambda: keras.optimizers.SGD(LR, momentum=0.9, nesterov=True),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(LR),
}
OPTIMIZERS = {
    name: make
    for name, make in OPTIMIZERS.items()
    if hasattr(keras.optimizers, name.partition(" ")[0])  # not all are in older Keras
}
WRAPPERS = {
    "Accum": lambda o: optimizers.AccumOptimizer(o, 1),
    "Clip": lambda o: optimizers.ClipOptimizer(o, 1e6),
    "Multiplier": lambda o: optimizers.MultiplierOptimizer(o, {}),
    "Lookahead": lambda o: optimizers.LookaheadOptimizer(o, 3, slow_step_size=1.0),
    "EMA": lambda o: optimizers.EMAOptimizer(o),
}
NESTED = WRAPPERS | {
    "Accum Clip EMA": lambda o: WRAPPERS["Accum"](WRAPPERS["Clip"](WRAPPERS["EMA"](o))),
    "LoRA": lambda o: optimizers.LoRAOptimizer(o, 1, include="kernel"),
    "Periodic": lambda o: optimizers.PeriodicOptimizer(o, "sgd", slow="bias", period=1),
    "LossScale Accum": lambda o: keras.optimizers.LossScaleOptimizer(WRAPPERS["Accum"](o)),
}
if KERAS_SAYS_NOTHING:
    del OPTIMIZERS["Muon"]  # in Keras 3.10 it fails on TensorFlow
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
each_nesting = pytest.mark.parametrize("wrap", NESTED.values(), ids=NESTED)


def accepts(wrapper: str, name: str) -> bool:
    """What computes its state from the weights is refused where the weights are changed."""
    follows = name in ("Ftrl", "ScheduleFreeAdamW", "SGD momentum")
    return not (follows and wrapper in ("Multiplier", "Lookahead"))


def habits(wrappers: dict, without: tuple[str, ...] = ()):
    """AdamW in all wrappers; under `thorough` every other optimizer in three at once."""
    others = [name for name in OPTIMIZERS if name not in ("AdamW", *without)]
    nested = NESTED["Accum Clip EMA"]
    return pytest.mark.parametrize(
        ("wrap", "make"),
        [(wrap, OPTIMIZERS["AdamW"]) for wrap in wrappers.values()]
        + [pytest.param(nested, OPTIMIZERS[n], marks=pytest.mark.thorough) for n in others],
        ids=[*wrappers, *others],
    )


PAIRS = [(w, n) for n in OPTIMIZERS for w in WRAPPERS if accepts(w, n)]


def model_and_data():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, activation="tanh", name="trunk")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(24, 5)).astype("float32")
    return model, x, rng.normal(size=(24, 2)).astype("float32")


def fit(optimizer, model=None, **options):
    built, x, y = model_and_data()
    model = built if model is None else model
    compiling = {"jit_compile", "steps_per_execution", "run_eagerly"} & options.keys()
    compile_options = {key: options.pop(key) for key in compiling}
    model.compile(optimizer, "mse", **compile_options)
    model.fit(x, y, **{"batch_size": 4, "shuffle": False, "verbose": 0} | options)
    return model


def assert_same(a, b, limit=0.0):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=limit)


# --- steps


@pytest.mark.parametrize(("wrapper", "name"), PAIRS)
def test_steps_without_some_gradients(wrapper, name):
    rng = np.random.default_rng(0)
    start = [rng.normal(size=s).astype("float32") for s in ((6, 4), (4,), (4, 3))]
    steps = [[rng.normal(size=w.shape).astype("float32") for w in start] for _ in range(4)]

    def run(optimizer):
        variables = [keras.Variable(w, name=f"w{i}") for i, w in enumerate(start)]
        for t, grads in enumerate(steps):
            given = [None if i == 2 and t in (1, 2) else g for i, g in enumerate(grads)]
            pairs = zip(given, variables, strict=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Gradients do not exist")
                pairs = [(g if g is None else ops.convert_to_tensor(g), v) for g, v in pairs]
                updates = optimizer.apply_gradients(pairs)
        assert int(updates) == int(optimizer.iterations) == 4
        return [ops.convert_to_numpy(v) for v in variables]

    plain = run(OPTIMIZERS[name]())
    for a, b in zip(run(WRAPPERS[wrapper](OPTIMIZERS[name]())), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.thorough
@pytest.mark.parametrize(("wrapper", "name"), PAIRS)
def test_fit_of_every_optimizer(wrapper, name):
    plain = fit(OPTIMIZERS[name](), jit_compile=JIT)
    assert_same(fit(WRAPPERS[wrapper](OPTIMIZERS[name]()), jit_compile=JIT), plain, 2e-6)


@each_wrapper
def test_no_gradient_at_all_and_numpy_gradients(wrap):
    variables = [keras.Variable([1.0], name="a"), keras.Variable([1.0], name="b")]
    optimizer = wrap(keras.optimizers.SGD(0.5))
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None, None], variables)
    optimizer.apply([np.ones(1, "float32"), np.ones(1)], variables)
    for variable in variables:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), [0.5])


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "Accum"])
def test_only_accumulation_takes_a_weight(name):
    with pytest.raises(ValueError, match="weight is for AccumOptimizer"):
        WRAPPERS[name]("sgd").apply([ops.ones(1)], [keras.Variable([1.0])], weight=2.0)


@habits(WRAPPERS, ("SGD momentum",))
def test_frozen_and_thawed_between_fits(wrap, make):
    if BACKEND == "jax":
        pytest.skip("Keras refuses another set of variables on JAX")

    def run(optimizer):
        model = fit(optimizer)
        for trainable in (False, True):
            model.get_layer("head").trainable = trainable
            fit(optimizer, model)
        return model

    plain = run(make())
    assert_same(run(wrap(make())), plain, 1e-6)


@habits(WRAPPERS)
@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on PyTorch")
def test_several_steps_in_one_execution(wrap, make):
    plain = fit(make(), steps_per_execution=3)
    assert_same(fit(wrap(make()), steps_per_execution=3), plain, 1e-6)


@each_nesting
def test_float64_weights_keep_their_digits(wrap):
    if BACKEND == "jax":
        import jax

        context = jax.enable_x64(True)
    else:
        context = warnings.catch_warnings()
    start = np.linspace(1, 2, 6).reshape(2, 3) + 1e-12  # float32 rounds these to 1e-7
    with context:
        variables = [
            keras.Variable(start, dtype="float64", name="kernel"),
            keras.Variable(start[0], dtype="float64", name="bias"),
        ]
        optimizer = wrap(keras.optimizers.SGD(2.0**-4))
        if isinstance(optimizer, optimizers.LoRAOptimizer):
            optimizer = wrap(keras.optimizers.SGD(0.0))
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and BACKEND == "jax":
            pytest.skip("LossScaleOptimizer.apply leaks tracers on JAX")
        optimizer.build(variables)
        scale = float(optimizer.scale_loss(ops.ones(())))
        grads = [ops.convert_to_tensor(scale * start, "float64") for start in (start, start[0])]
        optimizer.apply(grads, variables)
        moved = [ops.convert_to_numpy(v) for v in variables]
    rates = 2.0**-4 * (not isinstance(optimizer, optimizers.LoRAOptimizer))
    np.testing.assert_allclose(moved[0], start * (1 - rates), rtol=1e-14)


# --- rates and decay


@pytest.mark.parametrize("name", [name for name in NESTED if "LossScale" not in name])
def test_excluded_from_weight_decay(name):  # Keras's LossScaleOptimizer does not pass it on
    wrap = NESTED[name]

    def make():
        return keras.optimizers.AdamW(LR, weight_decay=0.5)

    def decayed(optimizer):
        kernel = keras.Variable(np.ones((3, 2), "float32"), name="kernel")
        bias = keras.Variable(np.ones(2, "float32"), name="bias")
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.build([kernel, bias])
        for _ in range(2):
            model_step(optimizer, [kernel, bias])
        return [ops.convert_to_numpy(v).mean() for v in (kernel, bias)]

    expected = decayed(make())
    assert expected[0] < 1 == expected[1]
    optimizer = wrap(make())
    actual = decayed(optimizer)
    assert actual[1] == 1
    if not isinstance(optimizer, optimizers.LoRAOptimizer):  # there it acts on the factors
        assert actual[0] == pytest.approx(expected[0], rel=1e-6)


def model_step(optimizer, variables):
    """One step with gradients of zero."""
    grads = [ops.zeros(v.shape) for v in variables]
    if BACKEND != "jax":
        optimizer.apply(grads, variables)
        return
    weights, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for v, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
        v.assign(value)


@pytest.mark.parametrize("when", ["before build", "after build"])
def test_a_matrix_excluded_from_decay_excludes_its_factors(when):
    kernel = keras.Variable(np.ones((3, 2), "float32"), name="kernel")
    other = keras.Variable(np.ones((3, 2), "float32"), name="other")
    optimizer = optimizers.LoRAOptimizer(keras.optimizers.SGD(0.5, weight_decay=0.5), 1, seed=0)
    for action in ("before build", "build", "after build"):
        if action == "build":
            optimizer.build([kernel, other])
        elif action == when:
            optimizer.exclude_from_weight_decay(var_list=[kernel])
    before = [ops.convert_to_numpy(optimizer.factors(v)[0]).copy() for v in (kernel, other)]
    optimizer.apply([ops.zeros((3, 2))] * 2, [kernel, other])
    after = [ops.convert_to_numpy(optimizer.factors(v)[0]) for v in (kernel, other)]
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_allclose(after[1], 0.75 * before[1], rtol=1e-6)
    assert len(optimizer.own_variables) == 2 + 4  # no weight of the model among them


@each_wrapper
def test_schedules_and_callbacks_set_the_rate(wrap):
    def run(around):
        schedule = keras.optimizers.schedules.ExponentialDecay(LR, 4, 0.5)
        model = fit(around(keras.optimizers.Adam(schedule)), epochs=2)
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=10.0)
        other = fit(around(keras.optimizers.Adam(LR)), epochs=3, callbacks=[halve, plateau])
        return model, other, float(ops.convert_to_numpy(other.optimizer.learning_rate))

    plain, wrapped = run(lambda o: o), run(wrap)
    assert_same(plain[0], wrapped[0], 1e-6)
    assert_same(plain[1], wrapped[1], 1e-6)
    assert plain[2] == wrapped[2] < LR / 8


# --- loss scaling


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


@habits(WRAPPERS)
def test_loss_scaling_under_mixed_float16(wrap, make, mixed_float16):
    plain = fit(make(), jit_compile=JIT)
    wrapped = fit(wrap(make()), jit_compile=JIT)
    assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer)
    assert_same(wrapped, plain, 2e-5)
    scales = [float(ops.convert_to_numpy(m.optimizer.dynamic_scale)) for m in (plain, wrapped)]
    assert scales == [2.0**15] * 2  # nothing was skipped


@pytest.mark.parametrize("name", ["Accum", "Multiplier", "Lookahead", "EMA"])
def test_two_loss_scales_are_refused(name, mixed_float16):
    model, x, y = model_and_data()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    message = r"scaled twice.*outside, LossScaleOptimizer\("
    if KERAS_SAYS_NOTHING:
        with pytest.raises(ValueError, match=message):
            WRAPPERS[name](scaled)
        return
    inside = WRAPPERS[name](scaled)
    with pytest.raises(ValueError, match=message):
        model.compile(inside, "mse")
    # One scale acts where the user says so.
    model.compile(inside, "mse", auto_scale_loss=False)
    before = model.get_weights()
    model.fit(x, y, verbose=0)
    moved = max(np.abs(a - b).max() for a, b in zip(before, model.get_weights(), strict=True))
    plain = fit(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), batch_size=32)
    assert_same(model, plain, 1e-5)
    assert moved > 1e-4


def test_accumulation_in_half_precision_is_exact_while_nothing_overflows(mixed_float16):
    small = fit(optimizers.AccumOptimizer(keras.optimizers.Adam(LR), 2), batch_size=4)
    large = fit(keras.optimizers.Adam(LR), batch_size=8)
    assert_same(small, large, 2e-4)


# --- files and copies


# Two steps, and on TensorFlow without the time to trace them.
SHORT = {"batch_size": 12, "run_eagerly": BACKEND == "tensorflow"}


def trained(wrap, make=OPTIMIZERS["AdamW"]):
    return fit(wrap(make()), **SHORT)


def state_of(model):
    return [ops.convert_to_numpy(v).copy() for v in model.optimizer.variables]


@habits(NESTED)
def test_config_pickle_and_deepcopy(wrap, make):
    optimizer = wrap(make())
    config = keras.saving.serialize_keras_object(optimizer)
    for twin in (
        keras.saving.deserialize_keras_object(config),
        pickle.loads(pickle.dumps(optimizer)),
        copy.deepcopy(optimizer),
    ):
        assert type(twin) is type(optimizer)
        assert twin.get_config() == optimizer.get_config()


@habits(NESTED)
def test_weights_of_a_trained_model_in_a_fresh_one(wrap, make, tmp_path):
    path = tmp_path / "m.weights.h5"
    model = trained(wrap, make)
    model.save_weights(path)
    fresh, _, _ = model_and_data()
    fresh.compile(wrap(make()), "mse")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        fresh.load_weights(path)
    assert_same(fresh, model)
    assert not int(ops.convert_to_numpy(fresh.optimizer.iterations))
    fit(fresh.optimizer, fresh, **SHORT)
    # A built one takes the state.
    built = trained(wrap, make)
    fit(built.optimizer, built, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        built.load_weights(path)
    for a, b in zip(state_of(built), state_of(model), strict=True):
        np.testing.assert_array_equal(a, b)
    fit(built.optimizer, built, **SHORT)
    fit(model.optimizer, model, **SHORT)
    assert_same(built, model)


@habits(NESTED, ("ScheduleFreeAdamW",))  # Keras builds it before it loads the weights
def test_a_model_saved_before_training(wrap, make, tmp_path):
    model, *_ = model_and_data()
    model.compile(wrap(make()), "mse")
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    if wrap is not NESTED["LoRA"]:  # whose first factors are drawn
        assert_same(fit(loaded.optimizer, loaded, **SHORT), trained(wrap, make), 1e-6)


@habits(NESTED)
def test_weights_of_a_model_trained_with_another_optimizer(wrap, make, tmp_path):
    path = tmp_path / "m.weights.h5"
    plain = fit(keras.optimizers.Adam(LR), **SHORT)
    plain.save_weights(path)
    model = trained(wrap, make)
    before = state_of(model)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        model.load_weights(path)
    assert_same(model, plain)
    for a, b in zip(state_of(model), before, strict=True):  # all of it, wrapper and inner
        np.testing.assert_array_equal(a, b)
    # And back.
    model.save_weights(path)
    before = state_of(plain)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        plain.load_weights(path)
    for a, b in zip(state_of(plain), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (lambda: WRAPPERS["EMA"]("sgd"), lambda: WRAPPERS["Lookahead"]("sgd")),
        (lambda: WRAPPERS["Accum"]("sgd"), lambda: WRAPPERS["Accum"]("adam")),
        (lambda: WRAPPERS["Clip"]("adam"), lambda: WRAPPERS["Clip"]("sgd")),
        (
            lambda: WRAPPERS["Clip"](WRAPPERS["EMA"]("sgd")),
            lambda: WRAPPERS["EMA"](WRAPPERS["Clip"]("sgd")),
        ),
    ],
)
def test_state_of_another_wrapper_is_never_taken(saved, loaded, tmp_path):
    path = tmp_path / "m.weights.h5"
    fit(saved(), **SHORT).save_weights(path)
    model = fit(loaded(), **SHORT)
    before = state_of(model)
    with pytest.warns(UserWarning, match=r"the saved optimizer has \d+, of|has the shape"):
        model.load_weights(path)
    for a, b in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_of_another_shape_is_never_taken():
    def built(width):
        optimizer = WRAPPERS["Accum"](keras.optimizers.Adam(LR))
        optimizer.build([keras.Variable(np.ones(2)), keras.Variable(np.ones(width))])
        return optimizer

    saved, optimizer, store = built(3), built(4), {}
    saved.iterations.assign(7)
    saved.save_own_variables(store)
    with pytest.warns(UserWarning, match=r"has the shape \(4,\) whereas the saved one has"):
        optimizer.load_own_variables({k: np.asarray(v) for k, v in store.items()})
    assert int(optimizer.iterations) == 0
    with pytest.raises(ValueError, match="weights must have the shapes of the state"):
        optimizer.set_weights([ops.convert_to_numpy(v) for v in saved.variables])
    assert int(optimizer.iterations) == 0
