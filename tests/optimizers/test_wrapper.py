"""UpdateWrapper: what MultiplierOptimizer, LazyOptimizer and LayerAdaptiveOptimizer share."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import (
    BACKEND,
    LR,
    build,
    distance,
    fit,
    run,
    thirds,
    weights_of,
)
from reference import optimizers as numpy_optimizers
from reference import update_wrappers as reference
from reference.problems import Regression

from keras_ext import optimizers
from keras_ext.optimizers import (
    AccumOptimizer,
    LayerAdaptiveOptimizer,
    LazyOptimizer,
    MultiplierOptimizer,
    UpdateWrapper,
)

# The variables are table, kernel and bias.
FACTORS = [0.5, 3.0, 1.0]
WRAPPERS = {
    "multiplier": (
        lambda inner: MultiplierOptimizer(inner, {"embeddings": 0.5, "kernel": 3.0}),
        lambda update: reference.multiply(update, FACTORS),
    ),
    "lazy": (LazyOptimizer, reference.lazy),
    "layer_adaptive": (
        lambda inner: LayerAdaptiveOptimizer(inner, exclude="bias"),
        lambda update: reference.layer_adaptive(update, lambda t: LR, excluded=[2]),
    ),
}
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)
CLIP = 0.5


def problem_with_absent_tokens():
    """In the first and third of three large batches half of the vocabulary is absent."""
    problem = Regression(embedding=True)
    for rows in (slice(0, 16), slice(32, 48)):
        problem.x[rows] %= 3
    return problem


def adamw(**arguments):
    return keras.optimizers.AdamW(
        LR, weight_decay=0.1, **({"global_clipnorm": CLIP} | arguments)
    )


def expected(problem, name):
    update = WRAPPERS[name][1](numpy_optimizers.adam(LR, weight_decay=0.1))
    return problem.train(
        update, thirds(problem), lambda g: numpy_optimizers.clip_global(g, CLIP)
    )


# --- against NumPy, with accumulation around and inside


@pytest.mark.parametrize(
    ("name", "where", "mode"),
    [
        *((name, "around", "xla") for name in WRAPPERS),
        *((name, "inside", "eager") for name in WRAPPERS if name != "lazy"),  # is refused
    ],
)
def test_micro_batches_equal_the_large_batch(name, where, mode):
    wrap, _ = WRAPPERS[name]
    around = where == "around"
    optimizer = AccumOptimizer(wrap(adamw()), 4) if around else wrap(AccumOptimizer(adamw(), 4))
    problem = problem_with_absent_tokens()
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    actual = fit(build(problem), problem, optimizer, batch_size=4, **compiled)
    assert distance(actual, expected(problem, name)) < 5e-6
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("where", ["inside", "around"])
@each_wrapper
def test_loss_scale_optimizer(name, where):
    wrap, _ = WRAPPERS[name]
    scale = keras.optimizers.LossScaleOptimizer
    optimizer = wrap(scale(adamw())) if where == "inside" else scale(wrap(adamw()))
    problem = problem_with_absent_tokens()
    actual = fit(build(problem), problem, optimizer, 16)
    assert distance(actual, expected(problem, name)) < 5e-6


@pytest.mark.parametrize("where", ["inside", "around"])
@each_wrapper
def test_an_overflow_moves_nothing(name, where):
    wrap, _ = WRAPPERS[name]
    scaled = keras.optimizers.LossScaleOptimizer
    optimizer = wrap(scaled(adamw())) if where == "inside" else scaled(wrap(adamw()))
    problem = problem_with_absent_tokens()
    problem.y[:] = np.inf
    assert distance(fit(build(problem), problem, optimizer, 16), problem.weights) == 0


@each_wrapper
def test_nothing_moves_while_the_inner_optimizer_waits(name):
    calls = []

    class Halve(keras.constraints.Constraint):
        def __call__(self, w):
            calls.append(1)
            return w / 2

    table = keras.layers.Embedding(2, 1, embeddings_constraint=Halve(), name="table")
    table.build()
    table.embeddings.assign([[8.0], [8.0]])
    if name == "lazy":
        optimizer = LazyOptimizer(keras.optimizers.SGD(0.0))
        # Its rows are those of w or w', which the constraint has seen: no second time.
        factors = {1: 0.5, 2: 0.25}
    else:
        wrap = {
            "multiplier": lambda inner: MultiplierOptimizer(inner, {"": 2.0}),
            "layer_adaptive": LayerAdaptiveOptimizer,
        }[name]
        optimizer = wrap(AccumOptimizer(keras.optimizers.SGD(0.0), 2))
        # w' = w / 2; multiplied by 2 that is 0. The adapted rate is 0: w, then halved.
        factors = {1: 1.0, 2: 0.0 if name == "multiplier" else 0.5}
    for step, factor in factors.items():
        optimizer.apply([ops.ones((2, 1))], [table.embeddings])
        np.testing.assert_array_equal(
            ops.convert_to_numpy(table.embeddings), 8.0 * factor, err_msg=f"step {step}"
        )


# --- what the base passes on


class Same(UpdateWrapper):
    """Rewrites every step as it is."""

    def rewrite(self, index, old, new, grad, before):
        self.seen = (old.dtype, before)
        return new

    def before_step(self):
        return ops.convert_to_tensor(7.0)


@pytest.mark.parametrize("embedding", [False, True], ids=["dense", "embedding"])
def test_rewriting_as_it_is_changes_nothing(embedding):
    problem = Regression(embedding)
    plain = adamw()
    if embedding:  # where TensorFlow would square the gradients of repeated tokens one by one
        plain = AccumOptimizer(plain, 1)
    results = [
        fit(build(problem), problem, optimizer, 8) for optimizer in (plain, Same(adamw()))
    ]
    assert distance(*results) <= (1e-6 if embedding else 0)


def test_rewrite_gets_at_least_float32():
    for dtype, expected_dtype in (("bfloat16", "float32"), ("float32", "float32")):
        variable = keras.Variable([1.0], dtype=dtype)
        optimizer = Same(keras.optimizers.SGD(0.5))
        optimizer.apply([ops.ones(1, dtype)], [variable])
        assert ops.convert_to_numpy(ops.cast(variable, "float32")) == [0.5]
        seen, before = optimizer.seen
        assert keras.backend.standardize_dtype(seen) == expected_dtype
        assert float(before) == 7


def test_absent_gradients_reach_the_inner_optimizer_as_absent():
    used, unused = keras.Variable([1.0], name="used"), keras.Variable([1.0], name="unused")
    optimizer = MultiplierOptimizer(keras.optimizers.AdamW(LR, weight_decay=0.5), {"used": 2.0})
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([ops.ones(1), None], [used, unused])
    assert ops.convert_to_numpy(unused) == [1.0]  # not even decayed
    assert ops.convert_to_numpy(used) < [1.0]


def test_float8_scales_are_left_alone():
    scale = keras.Variable([1.0], name="scale")
    scale.overwrite_with_gradient = True
    weight = keras.Variable([1.0], name="weight")
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(1.0), {"": 0.5})
    optimizer.apply([ops.ones(1) * 5, ops.ones(1)], [scale, weight])
    assert ops.convert_to_numpy(scale) == [5.0]
    assert ops.convert_to_numpy(weight) == [0.5]


# Keras has no stateless_apply on TensorFlow, and its optimizers for torch assign in place.
@pytest.mark.skipif(BACKEND != "jax", reason="stateless_apply is pure on JAX only")
@each_wrapper
def test_stateless_apply(name):
    problem = Regression(embedding=True)
    wrap, _ = WRAPPERS[name]
    model = build(problem)
    grads = [ops.convert_to_tensor(g, "float32") for g in problem.gradients(problem.weights)]
    optimizer, copy = wrap(adamw()), wrap(adamw())
    copy.build(model.trainable_variables)
    weights, _ = copy.stateless_apply(
        [v.value for v in copy.variables], grads, [v.value for v in model.trainable_variables]
    )
    assert distance(weights_of(model), problem.weights) == 0
    weights = [ops.convert_to_numpy(w) for w in weights]
    optimizer.apply(grads, model.trainable_variables)
    assert distance(weights_of(model), weights) < 1e-7


def test_gradients_that_require_gradients_leave_no_graph():
    variable = keras.Variable([1.0])
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(1.0), {"": 0.5})
    optimizer.apply([ops.ones(1)], [variable])
    assert not getattr(optimizer.variables[0].value, "requires_grad", False)
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), [0.5])


# --- saving


@each_wrapper
def test_config_round_trip(name):
    optimizer = WRAPPERS[name][0](adamw())
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
    with pytest.raises(TypeError, match="no_such_option"):
        type(optimizer).from_config(optimizer.get_config() | {"no_such_option": 1})


# --- refusals


@each_wrapper
def test_moving_averages_inside_are_refused(name):
    wrap, _ = WRAPPERS[name]
    averaging = keras.optimizers.SGD(use_ema=True)
    for inner in (averaging, keras.optimizers.LossScaleOptimizer(averaging)):
        with pytest.raises(
            ValueError, match=r"changes the steps that use_ema=True of '(?i:sgd)"
        ):
            wrap(inner)


def periodic(a, b):
    return optimizers.PeriodicOptimizer(a, b, slow="slow", period=1)


SGD, SCALE = keras.optimizers.SGD, keras.optimizers.LossScaleOptimizer
REFUSED = {
    "accumulation twice": lambda: AccumOptimizer(AccumOptimizer("sgd", 1), 2),
    "in Adam's moments": lambda: AccumOptimizer(optimizers.MomentumAccumAdam(1e-3, 4), 4),
    "in Tiger's": lambda: AccumOptimizer(optimizers.Tiger(1e-3, 4), 4),
    "in the slow branch": lambda: AccumOptimizer(periodic("sgd", AccumOptimizer("sgd", 2)), 2),
    "in Keras": lambda: AccumOptimizer(periodic("sgd", SGD(gradient_accumulation_steps=2)), 2),
    "an average moved": lambda: MultiplierOptimizer(
        periodic("sgd", optimizers.EMAOptimizer("adam")), {"a": 0.5}
    ),
    "use_ema moved": lambda: LazyOptimizer(periodic("sgd", SGD(use_ema=True))),
    "slow weights moved": lambda: optimizers.LookaheadOptimizer(
        periodic(optimizers.LookaheadOptimizer("sgd"), "sgd")
    ),
    "scaled gradients clipped": lambda: optimizers.ClipOptimizer(
        periodic("sgd", SCALE(SGD())), 1.0
    ),
    "overflows kept from the scale": lambda: AccumOptimizer(
        periodic("sgd", SCALE(SGD())), 2, nonfinite="skip"
    ),
    "rows of the last of several": lambda: LazyOptimizer(optimizers.Tiger(1e-3, 2)),
    "two rates": lambda: LayerAdaptiveOptimizer(periodic(SGD(1e-3), SGD(0.1))),
    "multipliers that cancel": lambda: LayerAdaptiveOptimizer(
        periodic("sgd", MultiplierOptimizer("sgd", {"a": 0.5}))
    ),
    "a basis that changes": lambda: optimizers.GaLoreOptimizer(
        optimizers.MomentumAccumSGD(0.1, 0.9, 2), 1
    ),
    "factors averaged": lambda: optimizers.LoRAOptimizer(optimizers.EMAOptimizer("sgd"), 1),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_stand_inside_is_refused_in_every_branch(make):
    with pytest.raises(ValueError, match=r"[Pp]ut|Set the number|Accumulate outside|must be"):
        make()


def test_numbers_of_numpy_are_numbers():
    k, x = np.int64(2), np.float32(0.5)
    for optimizer in (
        AccumOptimizer("sgd", k),
        optimizers.ClipOptimizer("sgd", x),
        optimizers.LookaheadOptimizer("sgd", k, x),
        optimizers.EMAOptimizer("sgd", x),
        optimizers.PeriodicOptimizer("sgd", "adam", "bias", k),
        optimizers.LoRAOptimizer("sgd", k, alpha=x),
        optimizers.GaLoreOptimizer("sgd", k, update_gap=k, scale=x),
        MultiplierOptimizer("sgd", {"a": x}),
        optimizers.MomentumAccumAdam(x, k, beta_1=x, beta_2=x, epsilon=x),
        optimizers.Tiger(x, k, beta=x, shrink=x),
        optimizers.RelativeAdafactor(x, beta_1=x, beta_2=x, min_dim_size_to_factor=k),
    ):
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()


def test_what_follows_the_weights_is_refused_inside():
    class Slow(UpdateWrapper):
        follows_weights = True

    with pytest.raises(ValueError, match="Slow of 'mine' keeps account of"):
        Same(AccumOptimizer(Slow("sgd", name="mine"), 2))
    with pytest.raises(ValueError, match="changes the steps that Ftrl"):
        Same(keras.optimizers.Ftrl())
    if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
        with pytest.raises(ValueError, match="changes the steps that ScheduleFreeAdamW"):
            Same(keras.optimizers.ScheduleFreeAdamW())


# --- two devices


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize(
    ("name", "nesting"),
    [("lazy", "around"), ("layer_adaptive", "inside"), ("multiplier", "loss_scale")],
)
def test_mirrored_strategy(mirrored, name, nesting):
    wrap, _ = WRAPPERS[name]
    make = {
        "around": lambda: (AccumOptimizer(wrap(adamw()), 2), 8),
        "inside": lambda: (wrap(AccumOptimizer(adamw(), 2)), 8),
        "loss_scale": lambda: (keras.optimizers.LossScaleOptimizer(wrap(adamw())), 16),
    }[nesting]
    problem = problem_with_absent_tokens()
    with mirrored.scope():
        model = build(problem)
        optimizer, batch_size = make()
    actual = fit(model, problem, optimizer, batch_size, jit_compile=False)
    assert distance(actual, expected(problem, name)) < 5e-6
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


def test_run_without_a_model():
    problem = Regression(embedding=False)
    grads = [problem.gradients(problem.weights)] * 2
    plain = run(keras.optimizers.SGD(LR), problem, grads)
    assert distance(plain, run(Same(keras.optimizers.SGD(LR)), problem, grads)) == 0
