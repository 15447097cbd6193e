"""No function of the seam loses an assignment or a loss, listed or not, compiled or not."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

JIT = keras.backend.backend() != "torch"
MODES = ["eager", "compiled"] if JIT else ["eager"]
if keras.backend.backend() == "tensorflow":
    MODES.append("graph")


def array(x):
    return ops.convert_to_numpy(x)


def numbers(*tensors):
    return [array(t).item() for t in tensors]


def variable(value, **kwargs):
    return keras.Variable(value, dtype="float32", **{"trainable": False, **kwargs})


def in_mode(fn, mode, listed):
    return fn if mode == "eager" else backend.compile(fn, listed, mode == "compiled")


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x, "float32"))


# Each takes a function of x that assigns `a`, and calls it once.
CALLS = {
    "run_if": lambda fn, x: backend.run_if(x[0] > 0, lambda: fn(x)),
    "otherwise": lambda fn, x: backend.run_if(x[0] < 0, lambda: None, lambda: fn(x)),
    "run_either": lambda fn, x: backend.run_either(x[0] > 0, fn, lambda x: x, x),
    "false_fn": lambda fn, x: backend.run_either(x[0] < 0, lambda x: x, fn, x, True),
    "recompute": lambda fn, x: backend.recompute(fn, [x]),
    "value_and_grad": lambda fn, x: backend.value_and_grad(lambda x: ops.sum(fn(x)))(x),
    "map_chunks": lambda fn, x: backend.map_chunks(fn, x[None]),
    "substitute": lambda fn, x: substituted(fn, x),
}


def substituted(fn, x):
    with backend.substitute([], []):
        fn(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_assigned_arrives(name, within, mode):
    """`within` another scope too, where no conditional of TensorFlow can assign by itself."""
    a, b = variable(1.0), variable(0.0)

    def fn(x):
        a.assign(a + ops.sum(x))
        b.assign(a * 10)
        return 2 * x

    def step(x):
        if within:
            with backend.substitute([a], [tensor(100.0)]):
                CALLS[name](fn, x)
        else:
            CALLS[name](fn, x)
        return a + b

    start = 100 if within else 1
    result = in_mode(step, mode, [a, b])(tensor([1.0, 2.0]))
    assert array(a).item() == start + 3
    assert array(b).item() == 10 * (start + 3)
    assert array(result).item() == 11 * (start + 3)  # read after it, in the same program


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", [False, True])
def test_each_branch_assigns_others(mode, recompute):
    a, b = variable(0.0), variable(0.0)

    def step(x):
        def one(inputs):
            a.assign(inputs["x"])
            return {"y": 3 * inputs["x"], "n": inputs["n"]}

        def other(inputs):
            b.assign(inputs["x"])
            return {"y": 5 * inputs["x"], "n": inputs["n"] + 1}

        def total(x):
            inputs = {"x": x, "n": ops.convert_to_tensor(7)}
            outputs = backend.run_either(x > 0, one, other, inputs, recompute)
            return outputs["y"] ** 2, outputs["n"]

        (value, number), gradient = backend.value_and_grad(total, has_aux=True)(x)
        return value, number, gradient

    step = in_mode(step, mode, [a, b])
    assert numbers(*step(tensor(2.0))) == [36, 7, 36]
    assert numbers(a, b) == [2, 0]
    assert numbers(*step(tensor(-1.0))) == [25, 8, -50]
    assert numbers(a, b) == [2, -1]


@pytest.mark.parametrize("name", ["compile", "values_after"])
def test_an_unlisted_assignment_names_the_variable(name):
    a, b = variable(1.0, name="listed"), variable(1.0, name="forgotten")

    def fn():
        a.assign_add(1.0)
        b.assign_add(1.0)

    if name == "compile" and keras.backend.backend() != "jax":
        backend.compile(fn, [a])()  # needs no list
        assert (array(a).item(), array(b).item()) == (2, 2)
    elif name == "values_after" and keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="no pure update on TensorFlow"):
            backend.values_after(fn, [a, b], [tensor(5.0), tensor(6.0)])
    else:
        with pytest.raises(ValueError, match="forgotten"):
            if name == "compile":
                backend.compile(fn, [a])()
            else:
                backend.values_after(fn, [a], [tensor(5.0)])
        assert (array(a).item(), array(b).item()) == (1, 1)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="refused, as Keras does")
def test_values_after():
    a, b = variable(1.0), variable(2.0)

    def fn():
        a.assign_add(b)

    values = backend.values_after(fn, [a, b], [tensor(5.0), tensor(6.0)])
    assert numbers(*values) == [11, 6]
    assert (array(a).item(), array(b).item()) == (1, 2)


def test_a_program_of_several_signatures_assigns_what_each_does():
    a, b = variable(0.0), variable(0.0)

    def fn(x):
        (a if x.shape[0] == 1 else b).assign_add(ops.sum(x))

    run = backend.compile(fn, [a, b])
    for number in (1, 2, 1):
        run(ops.ones((number,)))
    assert (array(a).item(), array(b).item()) == (2, 2)


# ------------------------------------------------------------------ state and draws of layers


class Apart(keras.Model):
    """Dropout, batch normalisation and a regularised layer, called through the seam."""

    def __init__(self, call, seed):
        super().__init__()
        self.how = call
        self.inner = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, activity_regularizer="l2"),
                keras.layers.Dropout(0.5, seed=seed),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(2),
            ]
        )

    def build(self, input_shape):
        pass

    def call(self, x, training=False):
        def run(x):
            return self.inner(x, training=training)

        if self.how == "recompute" and training:
            return backend.recompute(run, [x])
        if self.how == "map_chunks" and training:
            return backend.map_chunks(run, x[None])[0]
        return run(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("call", ["recompute", "map_chunks"])
def test_a_step_is_the_plain_one(call, seed, mode):
    """Weights, seeds, moving averages and activity losses after two steps."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(6, n)).astype("float32") for n in (3, 2))
    options = {"run_eagerly": True} if mode == "eager" else {"jit_compile": mode == "compiled"}
    found = []
    for how in (None, call):
        keras.utils.set_random_seed(0)
        model = Apart(how, seed)
        model.compile(keras.optimizers.SGD(0.1), "mse", **options)
        losses = model.fit(x, y, epochs=2, batch_size=6, shuffle=False, verbose=0)
        found.append([losses.history["loss"], *map(array, model.variables)])
    for plain, apart in zip(*found, strict=True):
        np.testing.assert_allclose(apart, plain, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["recompute", "run_either", "map_chunks"])
def test_a_gradient_to_a_substituted_weight(call, mode):
    """It is computed when the substitution is over, so it has to be kept until then."""
    w, count = variable([1.0, 2.0]), variable(0.0)
    x = tensor([3.0, 4.0])

    def fn(x):
        count.assign_add(1.0)
        return ops.sum(x * w**3) * (count + 1)  # 2 in the first call

    def loss(value):
        with backend.substitute([w], [value]):
            if call == "recompute":
                out = backend.recompute(fn, [x])
            elif call == "run_either":
                out = backend.run_either(x[0] > 0, fn, lambda x: ops.sum(x), x, True)
            else:
                out = backend.map_chunks(fn, ops.stack([x, 2 * x]))
        return ops.sum(out)

    value, gradient = in_mode(backend.value_and_grad(loss), mode, [w, count])(
        tensor([5.0, 6.0])
    )
    factor = 2 + 2 * 3 if call == "map_chunks" else 2
    np.testing.assert_allclose(array(value), factor * (3 * 125 + 4 * 216), rtol=1e-6)
    np.testing.assert_allclose(array(gradient), factor * np.array([225, 432]), rtol=1e-6)
    assert array(count).item() == (2 if call == "map_chunks" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_recompute_of_structures(mode):
    def fn(x, absent, pair):
        assert absent is None
        return {"a": x * pair[0], "b": [pair[1] ** 2, ops.cast(x, "int32")]}

    def loss(x):
        out = backend.recompute(fn, [x, None, (2 * x, 3 * x)])
        return ops.sum(out["a"]) + ops.sum(out["b"][0]), out["b"][1]

    run = in_mode(backend.value_and_grad(loss, has_aux=True), mode, [])
    (value, whole), gradient = run(tensor([1.0, -2.0]))
    assert array(value).item() == 11 * 5
    np.testing.assert_array_equal(array(whole), [1, -2])
    np.testing.assert_allclose(array(gradient), [22, -44])


@pytest.mark.skipif(not JIT, reason="nothing is compiled on PyTorch")
def test_a_loss_in_a_branch_is_refused():
    layer = keras.layers.Dense(2, activity_regularizer="l2", name="regularised")
    layer.build((None, 2))

    def step(x):
        return backend.run_either(ops.sum(x) > 0, layer, lambda x: x, x)

    with pytest.raises(ValueError, match="regularised"):
        backend.compile(step, layer.variables)(ops.ones((1, 2)))
