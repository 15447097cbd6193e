"""All sensible nestings of the wrappers against float64 NumPy objects nested the same way."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import build, weights_of
from reference import optimizers as exact
from reference import wrappers as reference
from reference.problems import Regression

from keras_ext import optimizers

BACKEND = keras.backend.backend()
LR, ROWS, BATCH = 0.05, 32, 4  # 8 micro-batches: 4 updates of 2, 2 periods of 2

# Wrapper -> (ours, NumPy's). The problem's variables: table, kernel, bias.
WRAPPERS = {
    "Accum": (
        lambda inner: optimizers.AccumOptimizer(inner, 2),
        lambda inner: reference.Accum(inner, 2),
    ),
    "Clip": (
        lambda inner: optimizers.ClipOptimizer(inner, 0.5),
        lambda inner: reference.Clip(inner, 0.5),
    ),
    "Multiplier": (
        lambda inner: optimizers.MultiplierOptimizer(inner, {"kernel": 0.25, "bias": 2.0}),
        lambda inner: reference.Multiplier(inner, [1.0, 0.25, 2.0]),
    ),
    "Lookahead": (
        lambda inner: optimizers.LookaheadOptimizer(inner, 2, 0.5),
        lambda inner: reference.Lookahead(inner, 2, 0.5),
    ),
    "LossScale": (keras.optimizers.LossScaleOptimizer, reference.Wrapper),
}


def makes_sense(nesting):
    """Outermost first: gradients are clipped unscaled, slow weights follow the real ones."""
    place = {name: depth for depth, name in enumerate(nesting)}
    scaled = {"Clip", "LossScale"} <= place.keys() and place["Clip"] < place["LossScale"]
    moved = {"Multiplier", "Lookahead"} <= place.keys()
    return not scaled and not (moved and place["Multiplier"] < place["Lookahead"])


ORDERS = [order for size in range(2, 6) for order in itertools.permutations(WRAPPERS, size)]
NESTINGS = [order for order in ORDERS if makes_sense(order)]
COMPLETE = [order for order in NESTINGS if len(order) == len(WRAPPERS)]


def nest(nesting, leaf, which):
    for name in reversed(nesting):
        leaf = WRAPPERS[name][which](leaf)
    return leaf


def expected(problem, nesting):
    optimizer = nest(nesting, reference.Leaf(exact.adam(LR)), which=1)
    weights = problem.weights
    for start in range(0, ROWS, BATCH):
        rows = slice(start, start + BATCH)
        weights = optimizer.step(weights, problem.gradients(weights, rows))
    return weights


def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def problem():
    return Regression(embedding=True, rows=ROWS)


@pytest.mark.parametrize("nesting", NESTINGS, ids="-".join)
def test_nesting_equals_numpy(problem, nesting):
    optimizer = nest(nesting, keras.optimizers.Adam(LR), which=0)
    variables = build(problem).trainable_variables
    optimizer.build(variables)
    step = stepper(optimizer)
    for start in range(0, ROWS, BATCH):
        weights = [ops.convert_to_numpy(v).astype("float64") for v in variables]
        scale = float(ops.convert_to_numpy(optimizer.scale_loss(ops.ones(()))))
        grads = problem.gradients(weights, slice(start, start + BATCH))
        step([ops.convert_to_tensor(g * scale, "float32") for g in grads])
    # Adam divides by the root of a square: rounding of a small gradient weighs more.
    assert distance(weights_from(variables), expected(problem, nesting)) < 5e-6


@pytest.mark.thorough
@pytest.mark.parametrize("nesting", COMPLETE[::8], ids="-".join)
def test_nesting_in_a_compiled_fit(problem, nesting):
    model = build(problem)
    optimizer = nest(nesting, keras.optimizers.Adam(LR), which=0)
    model.compile(optimizer, loss="mse", jit_compile=BACKEND != "torch")
    model.fit(problem.x, problem.y, batch_size=BATCH, shuffle=False, verbose=0)
    assert distance(weights_of(model), expected(problem, nesting)) < 5e-6


def test_what_makes_no_sense_is_refused():
    for nesting in (order for order in ORDERS if len(order) == 2 and not makes_sense(order)):
        with pytest.raises(ValueError, match="outside"):
            nest(nesting, keras.optimizers.Adam(LR), which=0)


def stepper(optimizer):
    """A function that makes one step with given gradients.

    Eager; but on JAX LossScaleOptimizer.apply leaks tracers, and every conditional would be
    traced anew at every step: there the step is pure and compiled.
    """
    if BACKEND != "jax":
        return optimizer.apply
    import jax

    step = jax.jit(optimizer.stateless_apply)

    def apply(grads):
        variables = optimizer._trainable_variables
        weights, state = step(
            [v.value for v in optimizer.variables], grads, [v.value for v in variables]
        )
        pairs = zip([*variables, *optimizer.variables], [*weights, *state], strict=True)
        for variable, value in pairs:
            variable.assign(value)

    return apply


def weights_from(variables):
    return [ops.convert_to_numpy(v).astype("float64") for v in variables]
