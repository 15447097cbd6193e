"""RelativeAdafactor against float64 NumPy, the paper's invariants and Keras's Adafactor."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import build, distance, fit, weights_of
from reference import optimizers as numpy_optimizers
from reference.adafactor import relative_adafactor
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.optimizers.adafactor import RelativeAdafactor, factored_axes

BACKEND = keras.backend.backend()
LR = 0.05
# Of the problem's weights (6, 4), (4, 3) and (3,) a threshold of 4 factors only the first.
SETTINGS = {
    "default": ({}, {}),
    "CLUE": (
        {"beta_1": 0.9, "min_dim_size_to_factor": 10**6},
        {"beta_1": 0.9, "min_dim": 10**6},
    ),
    "factored": ({"min_dim_size_to_factor": 4}, {"min_dim": 4}),
    "momentum, factored": (
        {"beta_1": 0.5, "min_dim_size_to_factor": 1},
        {"beta_1": 0.5, "min_dim": 1},
    ),
    "fixed beta_2": ({"beta_2": 0.9, "beta_1": 0.5}, {"beta_2": 0.9, "beta_1": 0.5}),
    "no clipping": (
        {"clipping_threshold": None, "min_dim_size_to_factor": 3},
        {"clip": None, "min_dim": 3},
    ),
    "other constants": (
        {"clipping_threshold": 0.5, "epsilon_1": 1e-2, "epsilon_2": 2.0},
        {"clip": 0.5, "epsilon_1": 1e-2, "epsilon_2": 2.0},
    ),
    "weight decay": ({"weight_decay": 0.5}, {"weight_decay": 0.5}),
    "excluded": (
        {"exclude_from_parameter_scale": ["bias$", "embeddings"]},
        {"scaled": lambda index: index == 1},
    ),
}


def batches(size=8):
    return [slice(i, i + size) for i in range(0, 48, size)]


def variables_of(values, dtype="float32"):
    return [keras.Variable(v, dtype=dtype, name=f"w{i}") for i, v in enumerate(values)]


def apply(optimizer, gradients, variables):
    tensors = [
        None if g is None else ops.convert_to_tensor(g, v.dtype)
        for g, v in zip(gradients, variables, strict=True)
    ]
    optimizer.apply(tensors, variables)


def numbers(variables):
    return [ops.convert_to_numpy(ops.cast(v, "float32")).astype("float64") for v in variables]


# --- against the mathematics


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "xla") for name in SETTINGS), ("momentum, factored", "eager")]
)
def test_equals_numpy_in_fit(name, mode):
    problem = Regression(embedding=True)
    arguments, reference = SETTINGS[name]
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    actual = fit(build(problem), problem, RelativeAdafactor(LR, **arguments), 8, **compiled)
    expected = problem.train(relative_adafactor(LR, **reference), batches())
    assert distance(actual, expected) < 3e-6
    assert distance(actual, problem.weights) > LR / 10


def test_no_learning_rate_is_the_schedule_of_the_paper():
    # From t = 10001 on 1 / sqrt(t) is below 1e-2: the iteration count is set there.
    problem = Regression(embedding=False)
    variables = variables_of(problem.weights)
    optimizer = RelativeAdafactor(None)
    optimizer.build(variables)
    weights, state = problem.weights, [{}, {}]
    for t in (1, 2, 39_999, 40_000):
        optimizer.iterations.assign(t - 1)
        grads = problem.gradients(problem.weights, slice(t % 7, 20))
        apply(optimizer, grads, variables)
        weights = relative_adafactor(None)(weights, grads, state, t)
    np.testing.assert_allclose(ops.convert_to_numpy(optimizer.learning_rate), 0.005, rtol=1e-4)
    assert distance(numbers(variables), weights) < 1e-6


def test_equals_keras_where_keras_can_express_it():
    # Keras always takes min(learning_rate, 1 / sqrt(t)) and always factors two axes.
    problem = Regression(embedding=False)
    theirs = fit(build(problem), problem, keras.optimizers.Adafactor(1e-2), 8)
    ours = RelativeAdafactor(None, min_dim_size_to_factor=1)
    assert distance(fit(build(problem), problem, ours, 8), theirs) < 1e-6
    assert distance(theirs, problem.weights) > 1e-3


def test_settings_of_clue():
    # Gradients of one sign: u = 1, and m is 0.1 of it at first. Plain numbers of the notes:
    # a kernel of RMS 0.04 settles at 2e-5, a gain of 1 at 5e-4, a bias of 0 at 5e-7.
    values = [np.full((3, 4), 0.04), np.ones(5), np.zeros(2)]
    variables = variables_of(values)
    optimizer = RelativeAdafactor(5e-4, beta_1=0.9, min_dim_size_to_factor=10**6)
    grads = [np.full_like(v, 7.0) for v in values]
    apply(optimizer, grads, variables)
    first = [v - w for v, w in zip(values, numbers(variables), strict=True)]
    np.testing.assert_allclose(first[0], 2e-6, rtol=2e-3)  # float32 rounding of the weight
    np.testing.assert_allclose(first[1], 5e-5, rtol=2e-3)
    np.testing.assert_allclose(first[2], 5e-8, rtol=1e-5)
    for _ in range(60):
        before = numbers(variables)
        apply(optimizer, grads, variables)
    step = [v - w for v, w in zip(before, numbers(variables), strict=True)]
    np.testing.assert_allclose(step[0], 5e-4 * before[0], rtol=5e-3)
    np.testing.assert_allclose(step[2], 5e-7, rtol=5e-3)


@pytest.mark.parametrize("min_dim", [1, 10**6], ids=["factored", "full"])
def test_step_does_not_depend_on_the_scale_of_the_gradient(min_dim):
    # 1e-10 to the fourth is 0 in float32: the order of operations in a factored v matters.
    gradient = np.random.default_rng(0).normal(size=(5, 4))
    results = []
    for scale in (1.0, 1e-10, 1e10):
        variables = variables_of([np.ones((5, 4))])
        optimizer = RelativeAdafactor(LR, min_dim_size_to_factor=min_dim)
        for t in range(3):
            apply(optimizer, [scale * np.roll(gradient, t)], variables)
        results.append(numbers(variables))
    assert distance(results[0], results[1]) < 1e-5
    assert distance(results[0], results[2]) < 1e-6


def test_factoring_is_exact_for_outer_products():
    rng = np.random.default_rng(0)
    gradient = np.outer(rng.normal(size=5), rng.normal(size=4))
    variables = variables_of([np.ones((5, 4))])
    apply(RelativeAdafactor(LR, min_dim_size_to_factor=1), [gradient], variables)
    np.testing.assert_allclose(numbers(variables)[0], 1 - LR * np.sign(gradient), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "min_size", "axes"),
    [
        ((), 1, None),
        ((300,), 1, None),
        ((128, 300), 128, (0, 1)),
        ((300, 128), 128, (1, 0)),
        ((300, 127), 128, None),
        ((12, 64, 768), 64, (1, 2)),
        ((768, 12, 64), 64, (2, 0)),
        ((768, 12, 64), 65, None),
        ((5, 5, 5), 5, (1, 2)),
    ],
)
def test_the_two_largest_axes_are_factored(shape, min_size, axes):
    assert factored_axes(shape, min_size) == axes


@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 2, 3), (3, 3, 3), (4, 1), (1, 1), (1,), ()])
def test_shapes(shape):
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=shape)]
    variables, state = variables_of(weights), [{}]
    optimizer = RelativeAdafactor(LR, beta_1=0.5, min_dim_size_to_factor=1)
    update = relative_adafactor(LR, beta_1=0.5, min_dim=1)
    for t in range(1, 4):
        grads = [rng.normal(size=shape)]
        apply(optimizer, grads, variables)
        weights = update(weights, grads, state, t)
    assert distance(numbers(variables), weights) < 1e-6


# --- state


def state_size(**arguments):
    variables = variables_of([np.ones((256, 128)), np.ones((128, 127)), np.ones(256)])
    optimizer = RelativeAdafactor(LR, **arguments)
    optimizer.build(variables)
    return sum(int(np.prod(v.shape)) for v in optimizer.variables) - 2  # iterations and rate


def test_state_is_as_small_as_promised():
    table, other, bias = 256 * 128, 128 * 127, 256
    factored = 256 + 128
    assert state_size() == factored + other + bias
    assert state_size(min_dim_size_to_factor=127) == factored + 128 + 127 + bias
    assert state_size(min_dim_size_to_factor=10**6) == table + other + bias
    assert state_size(beta_1=0.9) == factored + table + 2 * (other + bias)


def test_saved_state_resumes_bit_for_bit(tmp_path):
    problem = Regression(embedding=True)

    def make():
        return RelativeAdafactor(None, beta_1=0.9, min_dim_size_to_factor=4)

    whole = fit(build(problem), problem, make(), 8)
    model = build(problem)
    model.compile(make(), loss="mse")
    first, second = slice(0, 24), slice(24, 48)
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(problem.x[first], problem.y[first], **arguments)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert resumed.optimizer.get_config() == model.optimizer.get_config()
    resumed.fit(problem.x[second], problem.y[second], **arguments)
    for a, b in zip(whole, weights_of(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_config_round_trip():
    optimizer = RelativeAdafactor(
        None,
        beta_1=0.9,
        beta_2=0.99,
        epsilon_1=1e-20,
        epsilon_2=1e-2,
        clipping_threshold=None,
        min_dim_size_to_factor=64,
        exclude_from_parameter_scale=["bias", "gamma"],
        weight_decay=0.01,
        global_clipnorm=1.0,
        name="mine",
    )
    config = keras.saving.serialize_keras_object(optimizer)
    assert config["registered_name"] == "keras_ext>RelativeAdafactor"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == optimizer.get_config()
    assert copy.beta_2 == 0.99
    assert copy.global_clipnorm == 1.0
    assert copy.exclude_from_parameter_scale.config() == ["bias", "gamma"]


# --- unusual gradients


def test_rows_and_columns_without_gradient():
    # Where both had none a factored v underflows, and 0 / 0 would be NaN (in Keras it is).
    gradient = np.zeros((4, 4))
    gradient[:2, :2] = [[1.0, -1.0], [-1.0, 1.0]]
    variables = variables_of([np.ones((4, 4))])
    optimizer = RelativeAdafactor(LR, min_dim_size_to_factor=1, clipping_threshold=None)
    for _ in range(3):
        apply(optimizer, [gradient], variables)
    after = numbers(variables)[0]
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after[2:, 2:], 1.0)
    assert (after[:2, :2] != 1.0).all()


@pytest.mark.parametrize("min_dim", [1, 10**6])
def test_zero_gradient_moves_nothing(min_dim):
    variables = variables_of([np.ones((4, 4)), np.ones(3)])
    optimizer = RelativeAdafactor(LR, beta_1=0.9, min_dim_size_to_factor=min_dim)
    for _ in range(2):
        apply(optimizer, [np.zeros((4, 4)), np.zeros(3)], variables)
    for after in numbers(variables):
        np.testing.assert_array_equal(after, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_gradients_stay_in_their_weight(bad):
    variables = variables_of([np.ones((4, 4)), np.ones(3)])
    gradient = np.ones((4, 4))
    gradient[0, 0] = bad
    apply(RelativeAdafactor(LR), [gradient, np.ones(3)], variables)
    assert np.isnan(numbers(variables)[0]).any()  # not hidden
    np.testing.assert_allclose(numbers(variables)[1], 1 - LR, rtol=1e-6)


def test_absent_gradients():
    variables = variables_of([np.ones(3), np.ones(3)])
    optimizer = RelativeAdafactor(LR, beta_1=0.9, weight_decay=0.1)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        apply(optimizer, [None, np.ones(3)], variables)
    np.testing.assert_array_equal(numbers(variables)[0], 1.0)
    assert (numbers(variables)[1] < 1.0).all()


def test_bfloat16_weights_keep_float32_state():
    # The squares of 2^-70 are 0 in float16, and their means lose digits in bfloat16.
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(4, 4)).astype("float32") for _ in range(4)]
    variables = variables_of([np.zeros((4, 4))], dtype="bfloat16")
    optimizer = RelativeAdafactor(1.0, beta_1=0.5, epsilon_2=1.0, min_dim_size_to_factor=4)
    optimizer.build(variables)
    assert {v.dtype for v in optimizer.variables[2:]} == {"float32"}
    weights, state = [np.zeros((4, 4))], [{}]
    update = relative_adafactor(1.0, beta_1=0.5, epsilon_2=1.0, min_dim=4)
    for t, gradient in enumerate(gradients, start=1):
        apply(optimizer, [gradient], variables)
        seen = numbers([ops.convert_to_tensor(gradient, "bfloat16")])
        weights = update(weights, seen, state, t)
        # v does not depend on the weights, so it agrees to float32 rounding.
        state_of = {v.name.rsplit("_", 1)[-1]: v for v in optimizer.variables[2:]}
        row = ops.convert_to_numpy(state_of["row"]).ravel()
        np.testing.assert_allclose(row, state[0]["a"].ravel(), rtol=1e-6)
    assert distance(numbers(variables), weights) < 0.03


def test_repeated_tokens_are_summed_before_clipping():
    # SGD-like check of global_clipnorm: the norm is that of the sum over repeated tokens.
    problem = Regression(embedding=True)
    optimizer = RelativeAdafactor(LR, epsilon_1=1.0, global_clipnorm=0.1)
    actual = fit(build(problem), problem, optimizer, 8)
    expected = problem.train(
        relative_adafactor(LR, epsilon_1=1.0),  # so large that the norm matters
        batches(),
        lambda grads: numpy_optimizers.clip_global(grads, 0.1),
    )
    assert distance(actual, expected) < 2e-6
    unclipped = problem.train(relative_adafactor(LR, epsilon_1=1.0), batches())
    assert distance(expected, unclipped) > 1e-3


# --- with wrappers, on two devices


def test_inside_an_accum_optimizer():
    problem = Regression(embedding=True)
    arguments, reference = SETTINGS["momentum, factored"]
    optimizer = AccumOptimizer(RelativeAdafactor(LR, **arguments), 4)
    actual = fit(build(problem), problem, optimizer, 4, jit_compile=BACKEND != "torch")
    expected = problem.train(relative_adafactor(LR, **reference), batches(16))
    assert distance(actual, expected) < 2e-6


def test_inside_a_loss_scale_optimizer():
    problem = Regression(embedding=True)
    arguments, reference = SETTINGS["CLUE"]
    optimizer = keras.optimizers.LossScaleOptimizer(RelativeAdafactor(LR, **arguments))
    actual = fit(build(problem), problem, optimizer, 8)
    expected = problem.train(relative_adafactor(LR, **reference), batches())
    assert distance(actual, expected) < 2e-6


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(mirrored):
    problem = Regression(embedding=True)
    arguments, reference = SETTINGS["momentum, factored"]
    with mirrored.scope():
        model = build(problem)
        optimizer = RelativeAdafactor(LR, **arguments)
    actual = fit(model, problem, optimizer, 8, jit_compile=False)
    expected = problem.train(relative_adafactor(LR, **reference), batches())
    assert distance(actual, expected) < 3e-6
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel():
    problem = Regression(embedding=True)
    arguments, reference = SETTINGS["momentum, factored"]
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        actual = fit(build(problem), problem, RelativeAdafactor(LR, **arguments), 8)
    finally:
        keras.distribution.set_distribution(None)
    expected = problem.train(relative_adafactor(LR, **reference), batches())
    assert distance(actual, expected) < 3e-6


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_1": 1.0}, r"beta_1 must be a number in \[0, 1\), got 1.0"),
        ({"beta_1": -0.1}, r"beta_1 must be a number in \[0, 1\), got -0.1"),
        ({"beta_2": 1.0}, r"beta_2 must be a number in \[0, 1\), got 1.0"),
        ({"epsilon_1": 0.0}, "epsilon_1 must be a number > 0, got 0.0"),
        ({"epsilon_2": -1.0}, "epsilon_2 must be a number > 0, got -1.0"),
        ({"clipping_threshold": 0.0}, "clipping_threshold must be a number > 0, got 0.0"),
        (
            {"min_dim_size_to_factor": 0},
            "min_dim_size_to_factor must be an integer >= 1, got 0",
        ),
        ({"min_dim_size_to_factor": 1e6}, "integer >= 1, got 1000000.0"),
        (
            {"exclude_from_parameter_scale": [3]},
            "layers or variables, got 3",
        ),
        (
            {"exclude_from_parameter_scale": "("},
            r"layers or variables, got '\('",
        ),
        ({"clip_threshold": 1.0}, "clip_threshold"),
        ({"relative_step": True}, "relative_step"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RelativeAdafactor(LR, **arguments)
