"""Schedules against NumPy, at steps up to 10 million."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.optimizers.schedules import InverseSquareRoot, PiecewiseLinear

BACKEND = keras.backend.backend()
WARM_UP = {0: 0, 1000: 1, 10_000: 0.1}
CURVES = {
    "warm-up": WARM_UP,
    "unsorted": {10_000: 0.1, 0: 0, 1000: 1},
    "one point": {7: 0.5},
    "late start": {100: 0.25, 200: 1.0, 201: 0.0, 202: -1.0},
    "long": {0: 1.0, 10_000_000: 1e-6},
    "many": {2**i: (-1) ** i / (i + 1) for i in range(20)},
}


def values(schedule, steps):
    """One value per step, each from an integer tensor as an optimizer passes it."""
    return np.array(
        [float(ops.convert_to_numpy(schedule(ops.convert_to_tensor(int(s))))) for s in steps]
    )


def compiled(fn):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(fn, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(fn)
    return fn


@pytest.mark.parametrize("name", CURVES)
def test_equals_numpy_interp(name):
    points = CURVES[name]
    known = sorted(points)
    rng = np.random.default_rng(0)
    steps = {0, 1, *known, *(s + 1 for s in known), *(max(s - 1, 0) for s in known)}
    steps |= set(rng.integers(0, 10**7, 20).tolist()) | set(
        rng.integers(0, 12_000, 20).tolist()
    )
    steps = sorted(steps)
    expected = 0.02 * np.interp(steps, known, [points[s] for s in known])
    actual = values(PiecewiseLinear(points, learning_rate=0.02), steps)
    # Where multipliers of both signs meet, the sum is as precise as its terms.
    np.testing.assert_allclose(actual, expected, rtol=4e-7, atol=2e-9 if name == "many" else 0)


def test_the_end_of_a_long_decay_keeps_its_digits():
    # 10 steps before the end of a line from 1 to 0: 1e-6, which 1 - 0.999999 is to 3 digits.
    schedule = PiecewiseLinear({0: 1, 10**7: 0})
    np.testing.assert_allclose(values(schedule, [10**7 - 10]), [1e-6], rtol=1e-6)


def test_compiled_tensor_steps():
    schedule = PiecewiseLinear(WARM_UP, 1e-3)
    fn = compiled(lambda step: schedule(step))
    steps = [0, 1, 500, 1000, 5500, 10_000, 10**7]
    actual = [float(ops.convert_to_numpy(fn(ops.convert_to_tensor(s, "int32")))) for s in steps]
    expected = 1e-3 * np.interp(steps, list(WARM_UP), list(WARM_UP.values()))
    np.testing.assert_allclose(actual, expected, rtol=2e-7)


def test_accepts_a_number_and_a_variable():
    schedule = PiecewiseLinear({0: 0.0, 10: 1.0})
    assert float(ops.convert_to_numpy(schedule(5))) == 0.5
    assert (
        float(ops.convert_to_numpy(schedule(keras.Variable(5, dtype="int32", trainable=False))))
        == 0.5
    )


def test_in_an_optimizer_it_counts_updates_from_zero():
    # Multipliers 0, 1/2, 1, 1: four updates with gradient 1 move by 2.5 learning rates.
    optimizer = keras.optimizers.SGD(PiecewiseLinear({0: 0, 2: 1}, learning_rate=0.5))
    variable = keras.Variable([1.0])
    optimizer.apply([ops.ones(1)], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), [1.0])
    for _ in range(3):
        optimizer.apply([ops.ones(1)], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [1 - 0.5 * 2.5], atol=1e-6)


@pytest.mark.parametrize("schedule", [PiecewiseLinear(WARM_UP, 1e-3), InverseSquareRoot(0.25)])
def test_json_round_trip(schedule):
    config = keras.saving.serialize_keras_object(schedule)
    config = json.loads(json.dumps(config))
    for _ in range(2):  # deserialising must not eat the dictionary
        copy = keras.saving.deserialize_keras_object(config)
        assert type(copy) is type(schedule)
        assert copy.get_config() == schedule.get_config()
    steps = [0, 10, 999, 5000]
    np.testing.assert_array_equal(values(copy, steps), values(schedule, steps))


def test_saved_in_a_model_file(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile(keras.optimizers.Adam(PiecewiseLinear(WARM_UP, 1e-3)), loss="mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, batch_size=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    rate = ops.convert_to_numpy(loaded.optimizer.learning_rate)  # after four updates
    np.testing.assert_allclose(rate, 1e-3 * 4 / 1000, rtol=1e-6)


def test_inverse_square_root():
    steps = [0, 1, 3, 9_999, 10_000, 39_999, 10**7]
    t = np.array(steps) + 1.0
    actual = values(InverseSquareRoot(), steps)
    np.testing.assert_allclose(actual, np.minimum(1e-2, 1 / np.sqrt(t)), rtol=3e-7)
    np.testing.assert_allclose(values(InverseSquareRoot(2.0), [0, 3]), [1.0, 0.5], rtol=3e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), r"points must be a non-empty dictionary .*got \{\}"),
        (([(0, 1.0)],), "points must be a non-empty dictionary"),
        (({1.5: 1.0},), "integer steps >= 0, got the step 1.5"),
        (({True: 1.0},), "integer steps >= 0, got the step True"),
        (({"10": 1.0},), "integer steps >= 0, got the step '10'"),
        (({-1: 1.0},), "integer steps >= 0, got the step -1"),
        (({3: float("nan")},), "finite multipliers, got nan at step 3"),
        (({3: float("inf")},), "finite multipliers, got inf at step 3"),
        (({3: "1"},), "finite multipliers, got '1' at step 3"),
        (({3: None},), "finite multipliers, got None at step 3"),
        (({0: 1.0}, float("nan")), "learning_rate must be a finite number, got nan"),
        (({0: 1.0}, "fast"), "learning_rate must be a finite number, got 'fast'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseLinear(*arguments)


@pytest.mark.parametrize("maximum", [0.0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_bad_maximum(maximum):
    with pytest.raises(ValueError, match="maximum must be a finite number > 0, got"):
        InverseSquareRoot(maximum)


def test_unknown_keyword_is_refused():
    config = PiecewiseLinear(WARM_UP).get_config() | {"from_zero": True}
    with pytest.raises(TypeError, match="from_zero"):
        PiecewiseLinear.from_config(config)
