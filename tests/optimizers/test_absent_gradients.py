"""Which weights had a gradient is a fact of the cycle, not of a trace or a process."""

import keras
import numpy as np
import pytest
from compiled import compiled_step
from keras import ops

from keras_ext import optimizers

BACKEND = keras.backend.backend()
LR = 0.25  # with gradients of 1, all values below are exact in binary
ACCUMULATING = {
    "accum": lambda k: optimizers.AccumOptimizer(keras.optimizers.SGD(LR), k),
    "accum momentum": lambda k: optimizers.AccumOptimizer(
        keras.optimizers.SGD(LR, momentum=0.5), k
    ),
    "accum nesterov decay": lambda k: optimizers.AccumOptimizer(
        keras.optimizers.SGD(LR, momentum=0.5, nesterov=True, weight_decay=0.5), k
    ),
    "accum adam": lambda k: optimizers.AccumOptimizer(keras.optimizers.Adam(LR), k),
    "accum adamw": lambda k: optimizers.AccumOptimizer(
        keras.optimizers.AdamW(LR, weight_decay=0.5, global_clipnorm=0.5), k
    ),
    "accum clip multiplier": lambda k: optimizers.AccumOptimizer(
        optimizers.ClipOptimizer(
            optimizers.MultiplierOptimizer(keras.optimizers.Adam(LR), {"b": 0.5}), 0.5
        ),
        k,
    ),
    "accum lookahead": lambda k: optimizers.AccumOptimizer(
        optimizers.LookaheadOptimizer(keras.optimizers.SGD(LR, momentum=0.5), 2), k
    ),
    "accum ema adafactor": lambda k: optimizers.AccumOptimizer(
        optimizers.EMAOptimizer(optimizers.RelativeAdafactor(LR, beta_1=0.5)), k
    ),
    "accum periodic": lambda k: optimizers.AccumOptimizer(
        optimizers.PeriodicOptimizer(
            keras.optimizers.Adam(LR), keras.optimizers.SGD(LR, 0.5), slow="b", period=1
        ),
        k,
    ),
    "accum lora": lambda k: optimizers.AccumOptimizer(
        optimizers.LoRAOptimizer(
            keras.optimizers.AdamW(LR, weight_decay=0.5), 1, include="a|b", seed=0
        ),
        k,
    ),
    "accum galore": lambda k: optimizers.AccumOptimizer(
        optimizers.GaLoreOptimizer(
            keras.optimizers.AdamW(LR, weight_decay=0.5), 1, update_gap=1, include="a|b"
        ),
        k,
    ),
    "accum hidden": lambda k: optimizers.AccumOptimizer(
        optimizers.MomentumAccumAdamW(LR, 1, weight_decay=0.5), k
    ),
    "hidden sgd": lambda k: optimizers.MomentumAccumSGD(LR, 0.5, k, weight_decay=0.5),
    "hidden adamw": lambda k: optimizers.MomentumAccumAdamW(LR, k, weight_decay=0.5),
    "tiger": lambda k: optimizers.Tiger(LR, k, beta=0.5, weight_decay=0.5),
}


def variables():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 2)).astype("float32") for name in "tab"}
    return [keras.Variable(value, name=name) for name, value in values.items()]


def step_of(optimizer, weights, heads, jit):
    """A step of its own, whose gradients are those of the trunk and of the given heads."""
    grads = [np.full((3, 2), 1 + i, "float32") for i in range(3)]

    def step():
        given = [
            ops.convert_to_tensor(g) if i == 0 or "tab"[i] in heads else None
            for i, g in enumerate(grads)
        ]
        optimizer.apply(given, weights)

    state = [*weights, *optimizer.variables]
    return compiled_step(step, state, jit == "xla") if jit else step


def run(make, cycle, schedule, jit):
    optimizer, weights = make(cycle), variables()
    optimizer.build(weights)
    steps = {heads: step_of(optimizer, weights, heads, jit) for heads in sorted(set(schedule))}
    for heads in schedule:
        steps[heads]()
    return [ops.convert_to_numpy(w) for w in weights]


def by_hand(make_leaf, cycle, schedule):
    """Plain Keras on the means, of the variables that had a gradient in the cycle only."""
    leaf, weights = make_leaf(), variables()
    leaf.build(weights)
    for start in range(0, len(schedule) - cycle + 1, cycle):
        part = schedule[start : start + cycle]
        sums = [0.0, 0.0, 0.0]
        for heads in part:
            for i in range(3):
                sums[i] += (1.0 + i) * (i == 0 or "tab"[i] in heads)
        given = [i for i in range(3) if sums[i]]
        leaf.apply(
            [ops.full((3, 2), sums[i] / cycle) for i in given], [weights[i] for i in given]
        )
    return [ops.convert_to_numpy(w) for w in weights]


SCHEDULES = {
    "alternating": ["a", "b"] * 6,
    "neither": ["a", "", "b", "", "", "a", "", "", "ab", "", "", "b"],
    "rarely": ["a", "a", "a", "b", "a", "a", "a", "a", "a", "ab", "a", "b"],
}


@pytest.mark.parametrize(
    ("cycle", "schedule"), [(1, "rarely"), (2, "neither"), (3, "alternating")]
)
@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("accum", lambda: keras.optimizers.SGD(LR)),
        ("accum momentum", lambda: keras.optimizers.SGD(LR, momentum=0.5)),
        (
            "accum nesterov decay",
            lambda: keras.optimizers.SGD(LR, momentum=0.5, nesterov=True, weight_decay=0.5),
        ),
        ("accum adam", lambda: keras.optimizers.Adam(LR)),
        (
            "hidden sgd",
            lambda: keras.optimizers.SGD(LR, momentum=0.5, weight_decay=0.5),
        ),
        (
            "accum adamw",
            lambda: keras.optimizers.AdamW(LR, weight_decay=0.5, global_clipnorm=0.5),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_steps_equal_plain_keras(name, leaf, cycle, schedule):
    schedule = SCHEDULES[schedule]
    expected = by_hand(leaf, cycle, schedule)
    for jit in (False, "graph"):
        actual = run(ACCUMULATING[name], cycle, schedule, jit)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, atol=1e-6)


@pytest.mark.parametrize(
    ("cycle", "schedule", "jit"),
    [
        (2, "neither", "graph"),
        pytest.param(1, "rarely", "graph", marks=pytest.mark.thorough),
        pytest.param(3, "alternating", "xla", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("name", ACCUMULATING)
def test_compiled_steps_equal_one_eager_optimizer(name, cycle, schedule, jit):
    if "galore" in name and jit == "xla" and BACKEND == "tensorflow":
        jit = "graph"  # XLA's SVD on a CPU takes TensorFlow 20 seconds
    eager, compiled = (
        run(ACCUMULATING[name], cycle, SCHEDULES[schedule], j) for j in (False, jit)
    )
    for a, b in zip(eager, compiled, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-6)


# A sync of Lookahead goes back towards older weights, also where there is no gradient.
@pytest.mark.parametrize("name", [name for name in ACCUMULATING if name != "accum lookahead"])
def test_no_gradient_in_the_cycle_keeps_weight_and_state(name):
    optimizer, weights = ACCUMULATING[name](2), variables()
    optimizer.build(weights)
    both, first = (step_of(optimizer, weights, heads, False) for heads in ("ab", "a"))
    both(), both()
    before = ops.convert_to_numpy(weights[2])
    first(), first(), first(), first()
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[2]), before)
    # As if the steps without it had not been there, but for the count of bias correction.
    other, others = ACCUMULATING[name](2), variables()
    other.build(others)
    step = step_of(other, others, "ab", False)
    step(), step()
    states = [
        {v.path.rpartition("/")[2]: ops.convert_to_numpy(v) for v in o.variables}
        for o in (optimizer, other)
    ]
    of_b = [key for key in states[0] if key.startswith("b_") and "accumulator" not in key]
    assert of_b or name == "accum"
    for key in of_b:
        if key != "b_average":
            np.testing.assert_array_equal(states[0][key], states[1][key], err_msg=key)


@pytest.mark.parametrize("name", ["accum", "hidden sgd", "tiger"])
def test_the_fact_is_saved_in_mid_cycle(name, tmp_path):
    def fresh():
        a, b = keras.Variable([1.0], name="a"), keras.Variable([1.0], name="b")
        optimizer = ACCUMULATING[name](2)
        optimizer.build([a, b])
        return optimizer, [a, b]

    whole, weights = fresh()
    whole.apply([ops.ones(1), None], weights)
    store = {}
    whole.save_own_variables(store)
    whole.apply([None, ops.ones(1)], weights)
    expected = [ops.convert_to_numpy(w) for w in weights]
    loaded, weights = fresh()
    loaded.load_own_variables({k: np.asarray(v) for k, v in store.items()})
    loaded.apply([None, ops.ones(1)], weights)
    np.testing.assert_array_equal([ops.convert_to_numpy(w) for w in weights], expected)
    assert expected[0] != 1  # it moved
    if name == "accum":
        np.testing.assert_array_equal(expected, [[1 - LR / 2], [1 - LR / 2]])


def test_a_skipped_micro_batch_gives_no_gradient():
    weights = [keras.Variable([1.0], name=name) for name in "ab"]
    optimizer = optimizers.AccumOptimizer(
        keras.optimizers.SGD(LR, weight_decay=0.5), 1, nonfinite="skip"
    )
    optimizer.apply([ops.ones(1), ops.full((1,), np.nan)], weights)
    optimizer.apply([ops.ones(1), None], weights)
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), [1.0])


def head_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, name="trunk")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(24, 3)), rng.normal(size=(24, 2))


FREEZABLE = {
    **{name: make for name, make in ACCUMULATING.items() if "include" not in name},
    "clip": lambda k: optimizers.ClipOptimizer(keras.optimizers.AdamW(LR), 1.0),
    "ema": lambda k: optimizers.EMAOptimizer(keras.optimizers.AdamW(LR)),
    "lookahead": lambda k: optimizers.LookaheadOptimizer(keras.optimizers.AdamW(LR), 2),
    "adafactor": lambda k: optimizers.RelativeAdafactor(LR, beta_1=0.9),
    "loss scale": lambda k: keras.optimizers.LossScaleOptimizer(
        optimizers.AccumOptimizer(keras.optimizers.Adam(LR), k)
    ),
}
FREEZABLE["accum clip multiplier"] = lambda k: optimizers.AccumOptimizer(
    optimizers.ClipOptimizer(
        optimizers.MultiplierOptimizer(keras.optimizers.Adam(LR), {"kernel": 0.5}), 0.5
    ),
    k,
)
FREEZABLE["accum periodic"] = lambda k: optimizers.PeriodicOptimizer(
    optimizers.AccumOptimizer(keras.optimizers.Adam(LR), k), "adamw", slow="head", period=2
)
FREEZABLE["accum lora"] = lambda k: optimizers.AccumOptimizer(
    optimizers.LoRAOptimizer(keras.optimizers.AdamW(LR), 1), k
)
FREEZABLE["accum galore"] = lambda k: optimizers.AccumOptimizer(
    optimizers.GaLoreOptimizer(keras.optimizers.AdamW(LR), 1), k
)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras refuses another set of variables on JAX")
@pytest.mark.parametrize("cycle", [pytest.param(1, marks=pytest.mark.thorough), 2])
@pytest.mark.parametrize("name", FREEZABLE)
def test_frozen_layers_stay(name, cycle, recwarn):
    model, x, y = head_model()
    optimizer = FREEZABLE[name](cycle)
    frozen = model.get_layer("head")
    for part in ("before", "frozen", "thawed"):
        frozen.trainable = part != "frozen"
        model.compile(optimizer, loss="mse")
        before = {w.path: ops.convert_to_numpy(w) for w in model.weights}
        model.fit(x, y, batch_size=4, verbose=0)
        moved = {
            w.path: not np.array_equal(before[w.path], ops.convert_to_numpy(w))
            for w in model.weights
        }
        assert moved["trunk/kernel"]
        assert moved["head/kernel"] == (part != "frozen")
        assert part != "frozen" or not moved["head/bias"]
    # Plain Keras says nothing either: these variables were not passed at all.
    assert not [w for w in recwarn if "Gradients do not exist" in str(w.message)]


@pytest.mark.skipif(BACKEND == "jax", reason="Keras refuses another set of variables on JAX")
@pytest.mark.filterwarnings("ignore:fit ended with")
@pytest.mark.parametrize("name", ["accum", "accum adamw", "hidden sgd", "tiger"])
def test_layers_frozen_in_mid_cycle_stay(name):
    model, x, y = head_model()
    optimizer = ACCUMULATING[name](4)
    if name.startswith("accum"):
        optimizer.remainder = "carry"
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=4, verbose=0)  # 6 batches: two are left
    model.get_layer("head").trainable = False
    model.compile(optimizer, loss="mse")
    before = model.get_layer("head").get_weights()
    model.fit(x, y, batch_size=4, verbose=0)
    for a, b in zip(model.get_layer("head").get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_that_belongs_to_no_weight_is_an_error_when_it_matters():
    class Odd(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.odd = self.add_variable((7,), name="odd")

    with pytest.raises(ValueError, match="odd belongs to no weight"):
        run(lambda k: optimizers.AccumOptimizer(Odd(LR), k), 2, ["a", "b"], "graph")
    averaging = keras.optimizers.SGD(LR, use_ema=True)
    with pytest.raises(ValueError, match="EMAOptimizer outside"):
        run(lambda k: optimizers.AccumOptimizer(averaging, k), 2, ["a", "b"], "graph")
