"""What stands once per backend, each function against plain arithmetic."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

BACKEND = keras.backend.backend()


def array(x):
    return ops.convert_to_numpy(x)


def variable(value):
    return keras.Variable(np.asarray(value, "float32"))


def sparse(values, rows, shape):
    import tensorflow as tf

    return tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant(shape))


def test_all_backends_have_the_same_signatures():
    folder, found = Path(backend.__file__).parent, {}
    for name in ("jax", "tensorflow", "tensorflow_recompute", "torch", "scope"):
        nodes = ast.parse((folder / f"{name}.py").read_text()).body
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        parts = found.setdefault(name.partition("_")[0], {})
        parts |= {f.name: f for f in functions if f.name in backend.__all__}
        for f in functions:
            assert f.returns is not None, f.name
            given = [*f.args.args, *f.args.kwonlyargs, f.args.vararg]
            assert all(a is None or a.annotation is not None for a in given), f.name
    for name in backend.__all__:
        signatures = {
            module: ast.unparse(functions[name].args).replace("scope.", "")
            for module, functions in found.items()
            if name in functions
        }
        assert len(set(signatures.values())) == 1, signatures
        assert {"jax", "tensorflow", "torch"} <= {*signatures} or "scope" in signatures, name


def test_every_function_is_described():
    for name in backend.__all__:
        assert f"`{name}(" in backend.__doc__, name


def test_add_to():
    a, b = variable([1.0, 2.0]), variable([[1.0], [2.0], [3.0]])
    rows = np.zeros((3, 1), "float32")
    if BACKEND == "tensorflow":
        rows = sparse([[1.0], [2.0], [4.0]], [2, 0, 2], [3, 1])
    else:
        rows = ops.convert_to_tensor([[2.0], [0.0], [5.0]])
    backend.add_to([a, b], [ops.convert_to_tensor([10.0, 20.0]), rows], 0.5)
    np.testing.assert_allclose(array(a), [6, 12])
    np.testing.assert_allclose(array(b), [[2], [2], [5.5]])


def test_gradients_dense_and_sparse():
    dense = ops.convert_to_tensor([1.0, -2.0])
    np.testing.assert_allclose(array(backend.stored_values(dense)), [1, -2])
    np.testing.assert_allclose(array(backend.map_values(ops.abs, dense)), [1, 2])
    np.testing.assert_allclose(array(backend.densify(dense)), [1, -2])
    if BACKEND == "tensorflow":
        rows = sparse([[1.0], [-2.0], [4.0]], [2, 0, 2], [3, 1])
        np.testing.assert_allclose(array(backend.stored_values(rows)), [[1], [-2], [4]])
        squared = backend.map_values(ops.square, rows)
        np.testing.assert_allclose(array(backend.densify(squared)), [[4], [0], [17]])


def test_a_snapshot_keeps_its_values():
    a = variable([1.0, 2.0])
    (before,) = backend.snapshot([a])
    a.assign([5.0, 6.0])
    np.testing.assert_allclose(array(before), [1, 2])
    with backend.substitute([a], [ops.convert_to_tensor([7.0, 8.0])]):
        (inside,) = backend.snapshot([a])
    np.testing.assert_allclose(array(inside), [7, 8])


def test_apply_gradients_is_one_update():
    a = variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build([a])
    after = backend.snapshot([a])
    gradients = [ops.convert_to_tensor([2.0, 4.0])]
    backend.apply_gradients(optimizer, gradients, [a], after, [False])
    np.testing.assert_allclose(array(a), [0, 0])
    np.testing.assert_allclose(array(after[0]), [1, 2])
    assert int(optimizer.iterations.value) == 1


def test_one_device_is_one_replica():
    called = []
    backend.merge_replicas(lambda *told: called.append(told), [None, 2.0], 3.0)
    assert called == [([None, 2.0], 3.0)]
    assert backend.num_replicas() == 1


def test_product_flops():
    def fn(x):
        return ops.matmul(x, ops.transpose(x))

    assert backend.product_flops(fn, [((3, 5), "float32")]) == 2 * 3 * 5 * 3


def test_a_recorded_call_tells_what_was_before():
    a, b, c = variable(1.0), variable(2.0), variable(3.0)

    def fn():
        a.assign(a + 10)
        a.assign(a * c)
        b.assign(a + b)
        return b + 0

    result, variables, before = backend.call_recorded(fn)
    assert {id(v) for v in variables} == {id(a), id(b)}
    known = dict(zip(map(id, variables), map(float, map(array, before)), strict=True))
    assert known == {id(a): 1.0, id(b): 2.0}
    assert [float(array(v)) for v in (result, a, b, c)] == [35.0, 33.0, 35.0, 3.0]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_program_reads_what_the_variables_hold_now(jit_compile):
    a = variable([1.0, 2.0])
    run = backend.compile(lambda x: x * a, [a], jit_compile)
    x = ops.convert_to_tensor([3.0, 4.0])
    np.testing.assert_allclose(array(run(x)), [3, 8])
    a.assign([10.0, 20.0])
    np.testing.assert_allclose(array(run(x)), [30, 80])


def test_has_value():
    a = variable([1.0])
    assert backend.has_value(a)
    if BACKEND == "jax":
        a._value = None  # as the trainer leaves it
        assert not backend.has_value(a)


class Doubles(keras.callbacks.Callback):
    """Doubles the bias after each step but the last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        backend.sync_variables(self.model)
        bias = self.model.layers[-1].bias
        self.seen.append(float(array(bias)[0]))
        bias.assign(2 * bias)


def test_variables_are_read_and_assigned_between_steps():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=True)])
    model.compile(keras.optimizers.SGD(1.0), lambda y, y_pred: y_pred + 0 * y)
    doubles = Doubles()
    model.fit(np.zeros((3, 1)), np.zeros((3, 1)), batch_size=1, verbose=0, callbacks=[doubles])
    assert doubles.seen == [-1, -3, -7]  # one step less than twice that before
    assert float(array(model.layers[-1].bias)[0]) == -14
