"""LayerAdaptiveOptimizer: LAMB around Adam, and a relative step around anything."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import BACKEND, LR, build, distance, fit, run, thirds
from reference import optimizers as numpy_optimizers
from reference import update_wrappers as reference
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer, LayerAdaptiveOptimizer, MultiplierOptimizer


@pytest.fixture
def problem():
    return Regression(embedding=False)


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_around_adam_it_is_lamb(problem, mode):
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    adam = LayerAdaptiveOptimizer(keras.optimizers.Adam(LR))
    ours = fit(build(problem), problem, adam, 8, **compiled)
    assert distance(ours, fit(build(problem), problem, keras.optimizers.Lamb(LR), 8)) < 5e-6
    expected = problem.train(
        numpy_optimizers.lamb(LR), [slice(i, i + 8) for i in range(0, 48, 8)]
    )
    assert distance(ours, expected) < 5e-6


def test_around_adamw_the_decay_is_inside_the_ratio(problem):
    adam = numpy_optimizers.adam(LR, weight_decay=0.1)
    expected = problem.train(reference.layer_adaptive(adam, lambda t: LR), thirds(problem))
    inner = keras.optimizers.AdamW(LR, weight_decay=0.1)
    actual = fit(build(problem), problem, LayerAdaptiveOptimizer(inner), 16)
    assert distance(actual, expected) < 5e-6


@pytest.mark.parametrize(
    "make",
    [keras.optimizers.SGD, keras.optimizers.Lion, keras.optimizers.Adagrad],
)
def test_every_step_is_the_learning_rate_relative_to_the_weights(problem, make):
    grads = [problem.gradients(problem.weights)]
    after = run(LayerAdaptiveOptimizer(make(LR)), problem, grads)
    for w, new, g in zip(problem.weights, after, grads[0], strict=True):
        assert np.linalg.norm(new - w) == pytest.approx(LR * np.linalg.norm(w), rel=1e-5)
        assert np.vdot(new - w, g) < 0


def test_the_size_of_the_inner_step_cancels(problem):
    grads = [problem.gradients(problem.weights)]
    small, large = (
        run(
            LayerAdaptiveOptimizer(keras.optimizers.SGD(LR)),
            problem,
            [[c * g for g in grads[0]]],
        )
        for c in (1e-2, 1e2)
    )
    assert distance(small, large) < 1e-5


@pytest.mark.parametrize("nesting", ["alone", "loss_scale", "inside", "around", "built_in"])
def test_schedule_is_read_at_the_step_it_is_for(problem, nesting):
    schedule = keras.optimizers.schedules.InverseTimeDecay(LR, 1, 1.0)  # LR / (1 + updates)
    lamb = reference.layer_adaptive(numpy_optimizers.sgd(1.0), lambda t: LR / t)
    k = 1 if nesting in ("alone", "loss_scale") else 4
    expected = problem.train(lamb, thirds(problem))
    inner = keras.optimizers.SGD(
        schedule, gradient_accumulation_steps=4 if nesting == "built_in" else None
    )
    optimizer = {
        "alone": lambda: LayerAdaptiveOptimizer(inner),
        "loss_scale": lambda: LayerAdaptiveOptimizer(
            keras.optimizers.LossScaleOptimizer(inner)
        ),
        "inside": lambda: LayerAdaptiveOptimizer(AccumOptimizer(inner, 4)),
        "around": lambda: AccumOptimizer(LayerAdaptiveOptimizer(inner), 4),
        "built_in": lambda: LayerAdaptiveOptimizer(inner),
    }[nesting]()
    if nesting == "built_in":  # Keras counts micro-batches there: 3, 7 and 11 when it updates
        lamb = reference.layer_adaptive(numpy_optimizers.sgd(1.0), lambda t: LR / (4 * t))
        expected = problem.train(lamb, thirds(problem))
    assert distance(fit(build(problem), problem, optimizer, 16 // k), expected) < 5e-6


def test_learning_rate_can_be_set(problem):
    optimizer = LayerAdaptiveOptimizer(keras.optimizers.SGD(1.0))
    optimizer.learning_rate = LR
    grads = [problem.gradients(problem.weights)]
    after = run(optimizer, problem, grads)
    for w, new in zip(problem.weights, after, strict=True):
        assert np.linalg.norm(new - w) == pytest.approx(LR * np.linalg.norm(w), rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "gradient", "expected"),
    [
        ([0.0, 0.0], [1.0, -1.0], [-0.5, 0.5]),  # zero weights: the plain step
        ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),  # no step, and no 0 / 0
        ([3.0, 4.0], [0.0, 2.0], [3.0, 1.5]),  # lr ||w|| = 2.5
    ],
)
def test_zero_norms(weight, gradient, expected):
    variable = keras.Variable(weight)
    optimizer = LayerAdaptiveOptimizer(keras.optimizers.SGD(0.5))
    optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=1e-6)


def test_scalar_variable_and_nan():
    scalar, broken = keras.Variable(2.0), keras.Variable([2.0, 2.0])
    optimizer = LayerAdaptiveOptimizer(keras.optimizers.SGD(0.5))
    optimizer.apply(
        [ops.convert_to_tensor(0.1), ops.convert_to_tensor([np.nan, 1])], [scalar, broken]
    )
    assert float(ops.convert_to_numpy(scalar)) == 1.0
    # A NaN in the step leaves no norm: the plain step, NaN where it is.
    np.testing.assert_array_equal(ops.convert_to_numpy(broken), [np.nan, 1.5])


def test_bfloat16_norms_are_taken_in_float32():
    # In bfloat16 a sum of 4096 squares of 1 would stop at 256.
    variable = keras.Variable(np.ones(4096), dtype="bfloat16")
    optimizer = LayerAdaptiveOptimizer(keras.optimizers.SGD(0.5))
    optimizer.apply([ops.ones(4096, "bfloat16") / 4], [variable])
    assert set(ops.convert_to_numpy(ops.cast(variable, "float32"))) == {0.5}


def test_excluded_variables_take_the_plain_step(problem):
    sgd = numpy_optimizers.sgd(LR, 0.9)
    update = reference.layer_adaptive(sgd, lambda t: LR, excluded=[1])
    expected = problem.train(update, thirds(problem))
    inner = keras.optimizers.SGD(LR, 0.9)
    actual = fit(build(problem), problem, LayerAdaptiveOptimizer(inner, "bias$"), 16)
    assert distance(actual, expected) < 5e-6


def test_multipliers_outside_multiply_the_relative_step(problem):
    inner = LayerAdaptiveOptimizer(keras.optimizers.SGD(LR))
    after = run(
        MultiplierOptimizer(inner, {"": 0.5}), problem, [problem.gradients(problem.weights)]
    )
    for w, new in zip(problem.weights, after, strict=True):
        assert np.linalg.norm(new - w) == pytest.approx(LR * np.linalg.norm(w) / 2, rel=1e-5)


def test_refusals(problem):
    with pytest.raises(ValueError, match="cancels the multipliers of"):
        LayerAdaptiveOptimizer(AccumOptimizer(MultiplierOptimizer("sgd", {"kernel": 2.0}), 2))
    if hasattr(keras.optimizers, "MultiOptimizer"):
        multi = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD())
        with pytest.raises(ValueError, match=r"'multi_optimizer.* has no single learning rate"):
            LayerAdaptiveOptimizer(multi)
    with pytest.raises(ValueError, match="layers or variables, got 3"):
        LayerAdaptiveOptimizer("sgd", exclude=[3])
    with pytest.raises(ValueError, match="exclude: 'biass' matches no variable"):
        LayerAdaptiveOptimizer("sgd", exclude="biass").build(build(problem).trainable_variables)
