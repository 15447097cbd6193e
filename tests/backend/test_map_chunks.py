"""A loop over chunks: its results, gradients, draws and state, by hand in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

JIT = keras.backend.backend() != "torch"
MODES = ["eager", "compiled"] if JIT else ["eager"]
if keras.backend.backend() == "tensorflow":
    MODES.append("graph")
CHUNKS, SIZE, WIDTH, RATE = 3, 2, 4, 0.5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(CHUNKS, SIZE, WIDTH))
SHIFT = RNG.integers(0, 3, (CHUNKS, SIZE))
KERNEL = RNG.normal(size=(WIDTH, WIDTH))
COTANGENT = RNG.normal(size=(CHUNKS, SIZE, WIDTH))


def array(x):
    return ops.convert_to_numpy(x)


def tensor(x, dtype="float32"):
    return ops.convert_to_tensor(x, dtype)


def in_mode(fn, mode, listed):
    return fn if mode == "eager" else backend.compile(fn, listed, mode == "compiled")


def draws(seed, mode):
    """The masks of three calls of a Dropout with this seed."""
    keras.utils.set_random_seed(0)
    drop = keras.layers.Dropout(RATE, seed=seed)

    def draw():
        ones = ops.ones((SIZE, WIDTH))
        return ops.stack([drop(ones, training=True) for _ in range(CHUNKS)])

    return array(in_mode(draw, mode, drop.variables)()).astype("float64")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [1, None])
def test_gradients_by_hand(seed, mode):
    """y = tanh(x w) mask + shift, chunk by chunk; the cotangent of y is given."""
    masks = draws(seed, mode)
    assert (masks[0] != masks[1]).any()
    keras.utils.set_random_seed(0)
    drop = keras.layers.Dropout(RATE, seed=seed)
    kernel = keras.Variable(KERNEL, dtype="float32", trainable=True)
    count = keras.Variable(0.0, dtype="float32", trainable=False)
    listed = [kernel, count, *drop.variables]

    def fn(chunk):
        count.assign(2 * count + 1)  # not the same in another order, nor if done twice
        hidden = ops.tanh(ops.matmul(chunk["x"], kernel))
        out = drop(hidden, training=True) + ops.cast(chunk["shift"], hidden.dtype)[:, None]
        return {"y": out, "rows": chunk["shift"] + 1}

    def loss(inputs):
        x, w = inputs
        with backend.substitute([kernel], [w]):
            xs = {"x": x, "shift": tensor(SHIFT, "int32")}
            ys = backend.map_chunks(fn, xs)
        return ops.sum(ys["y"] * tensor(COTANGENT)), ys

    run = in_mode(backend.value_and_grad(loss, has_aux=True), mode, listed)
    (value, ys), (of_x, of_w) = run((tensor(X), tensor(KERNEL)))

    hidden = np.tanh(X @ KERNEL)
    expected = hidden * masks + SHIFT[..., None]
    inner = COTANGENT * masks * (1 - hidden**2)
    np.testing.assert_allclose(array(ys["y"]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(array(ys["rows"]), SHIFT + 1)
    np.testing.assert_allclose(array(value), np.sum(expected * COTANGENT), rtol=1e-5)
    np.testing.assert_allclose(array(of_x), inner @ KERNEL.T, rtol=1e-4, atol=1e-5)
    expected = np.einsum("nij,nik->jk", X, inner)
    np.testing.assert_allclose(array(of_w), expected, rtol=1e-4, atol=1e-5)
    assert array(count) == 7
    if seed is not None:
        assert array(drop.seed_generator.state)[1] == CHUNKS


class InChunks(keras.Model):
    """An embedding and a dense layer, in chunks or as they are."""

    def __init__(self, chunk):
        super().__init__()
        self.chunk = chunk
        layers = [
            keras.layers.Embedding(6, 4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, activation="tanh", activity_regularizer="l2"),
        ]
        self.encoder = keras.Sequential([keras.Input((5,)), *layers])

    def build(self, input_shape):
        pass

    def call(self, x, training=False):
        if not training or self.chunk is None:
            return self.encoder(x)
        ys = backend.map_chunks(self.encoder, ops.reshape(x, (-1, self.chunk, 5)))
        return ops.reshape(ys, (-1, 3))


@pytest.mark.parametrize("mode", MODES)
def test_fit(mode):
    """Gradients of weights, sparse ones too; each chunk adds its own activity loss."""
    rng = np.random.default_rng(1)
    ids, y = rng.integers(0, 6, (6, 5)).astype("int32"), rng.normal(size=(6, 3))
    options = {"run_eagerly": True} if mode == "eager" else {"jit_compile": mode == "compiled"}
    found = []
    for chunk in (2, None):
        keras.utils.set_random_seed(0)
        model = InChunks(chunk)
        start = [array(v) for v in model.trainable_variables]
        if chunk is None:  # three chunks, each of which divides by its own size
            dense = model.encoder.layers[-1]
            dense.activity_regularizer = keras.regularizers.L2(0.03)
        model.compile(keras.optimizers.SGD(1.0), "mse", **options)
        history = model.fit(ids, y, batch_size=6, shuffle=False, verbose=0)
        moved = [array(v) - s for v, s in zip(model.trainable_variables, start, strict=True)]
        found.append([history.history["loss"], *moved])
    for chunked, plain in zip(*found, strict=True):
        np.testing.assert_allclose(chunked, plain, rtol=1e-4, atol=1e-6)
    assert min(np.abs(moved).max() for moved in found[0][1:]) > 1e-3


def test_a_chunk_is_computed_again_for_its_gradient():
    calls = []

    def fn(x):
        calls.append(x)
        return ops.exp(ops.sin(x))

    def loss(x):
        out = ops.sum(backend.map_chunks(fn, x))
        forwards.append(len(calls))
        return out

    forwards = []
    if keras.backend.backend() != "jax":
        backend.value_and_grad(loss)(tensor(X))
        assert len(calls) == forwards[0] + CHUNKS
        return
    import jax

    def memory(fn):  # of what a compiled gradient holds besides arguments and results
        program = jax.jit(jax.grad(lambda x: fn(x).sum())).lower(np.ones((50, 1000), "float32"))
        return program.compile().memory_analysis().temp_size_in_bytes

    def wide(x):
        for _ in range(5):
            x = ops.sin(x[:, None] + x).sum(0)
        return x

    chunked = memory(lambda x: backend.map_chunks(lambda x: wide(x[:200]), x))
    assert chunked < 0.3 * memory(lambda x: ops.vectorized_map(lambda x: wide(x[:200]), x))
