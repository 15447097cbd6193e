"""Objectives against steps written by hand in float64, alone and combined."""

import keras
import numpy as np
import pytest
from keras import ops
from reference.objectives import (
    CLASSES,
    HIDDEN,
    L2,
    LENGTH,
    SIZE,
    TOKENS,
    Network,
    differences,
    divergence,
    regularised,
    unit,
)

from keras_ext import backend
from keras_ext.optimizers import AccumOptimizer, ClipOptimizer
from keras_ext.training import (
    FGM,
    VAT,
    Batch,
    GradientPenalty,
    Objective,
    RDrop,
    with_objective,
)

BACKEND = keras.backend.backend()
JIT = BACKEND != "torch"
MODES = [False, True] if JIT else [False]
RNG = np.random.default_rng(0)
X = RNG.integers(0, TOKENS, (4, LENGTH)).astype("int32")
Y = RNG.integers(0, CLASSES, 4).astype("int32")
NOISE = np.cos(np.arange(100.0))
EPSILON, ALPHA, WEIGHT, XI = 0.3, 1.5, 0.4, 0.2


class Center(keras.layers.Layer):
    """Batch statistics and their moving average, as a batch normalisation has them."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False, name="moving_mean"
        )

    def call(self, x, training=False):
        if not training:
            return x - self.mean
        mean = ops.mean(x, axis=0)
        self.mean.assign(0.9 * self.mean + 0.1 * ops.stop_gradient(mean))
        return x - mean


def normal(stddev, seed):
    return keras.initializers.RandomNormal(stddev=stddev, seed=seed)


def network():
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(
        TOKENS, SIZE, name="embedding", embeddings_initializer=normal(0.7, 1)
    )(tokens)
    x = Center(name="center")(keras.layers.Flatten()(x))
    x = keras.layers.Dropout(0.4, seed=3, name="dropout")(x)
    x = keras.layers.Dense(
        HIDDEN,
        "tanh",
        kernel_initializer=normal(0.9, 2),
        kernel_regularizer=keras.regularizers.L2(L2),
    )(x)
    x = keras.layers.Dense(CLASSES, "softmax", kernel_initializer=normal(0.9, 4))(x)
    return keras.Model(tokens, x)


def trainable(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_weights]  # copies


def flat(model):
    return np.concatenate([w.ravel() for w in trainable(model)])


def masks(model, jit):
    """What the dropout layer multiplies with in its next two calls; nothing changes."""
    layer = model.get_layer("dropout")
    state, found = layer.seed_generator.state, []
    before = np.array(ops.convert_to_numpy(state))

    def draw():
        return layer(ops.ones((len(X), LENGTH * SIZE)), training=True)

    if BACKEND == "tensorflow":  # XLA draws other numbers
        draw = backend.compile(draw, [state], jit)
    for _ in range(2):
        found.append(ops.convert_to_numpy(draw()))
    state.assign(before)
    return found


def fgm(loss, slope, on):
    """L + L at a shift that is held."""

    def attacked(start):
        r = EPSILON * unit(slope(start, on))
        return lambda net: loss(net) + loss(net, **{on: r})

    return attacked


def entropy(net, number=0, **shift):
    return net.entropy(number, **shift)


def r_drop(net, **shift):
    return net.r_drop(ALPHA, **shift)


def r_drop_of_fgm(on):
    """Both passes have an attack of their own, each on its own draws."""

    def outer(start):
        shifts = [EPSILON * unit(start.slope(on, number)) for number in (0, 1)]

        def loss(net):
            parts = [entropy(net, i) + entropy(net, i, **{on: r}) for i, r in enumerate(shifts)]
            p, q = net.predict(0), net.predict(1)
            return sum(parts) / 2 + ALPHA / 4 * (divergence(p, q) + divergence(q, p))

        return loss

    return outer


def vat(on, base):
    def outer(start):
        shape = {"matrix": (TOKENS, SIZE), "out": (len(X), LENGTH, SIZE)}[on]
        noise = NOISE[: np.prod(shape)].reshape(shape)
        r, p = start.virtual_shift(on, noise, EPSILON, XI), start.predict(0)
        return lambda net: base(net) + WEIGHT * divergence(p, net.predict(0, **{on: r}))

    return outer


def penalty(on):
    return lambda start: lambda net: entropy(net) + WEIGHT / 2 * (net.slope(on) ** 2).sum()


def slope_of_r_drop(net, on):
    return net.r_drop_slope(ALPHA, on)


def on(where):
    return {"layer": "embedding", "on": {"out": "output"}.get(where, where)}


CASES = {
    "R-Drop": (lambda: [RDrop(ALPHA)], lambda start: r_drop),
    "FGM of R-Drop, matrix": (
        lambda: [FGM(epsilon=EPSILON, **on("matrix")), RDrop(ALPHA)],
        fgm(r_drop, slope_of_r_drop, "matrix"),
    ),
    "FGM of R-Drop, output": (
        lambda: [FGM(epsilon=EPSILON, **on("out")), RDrop(ALPHA)],
        fgm(r_drop, slope_of_r_drop, "out"),
    ),
    "R-Drop of FGM": (
        lambda: [RDrop(ALPHA), FGM(epsilon=EPSILON, **on("out"))],
        r_drop_of_fgm("out"),
    ),
    "VAT of R-Drop": (
        lambda: [VAT(epsilon=EPSILON, xi=XI, weight=WEIGHT, **on("out")), RDrop(ALPHA)],
        vat("out", r_drop),
    ),
}
for where in ("matrix", "out"):
    CASES[f"FGM, {where}"] = (
        lambda where=where: [FGM(epsilon=EPSILON, **on(where))],
        fgm(entropy, Network.slope, where),
    )
    CASES[f"penalty, {where}"] = (
        lambda where=where: [GradientPenalty(weight=WEIGHT, **on(where))],
        penalty(where),
    )
    CASES[f"VAT, {where}"] = (
        lambda where=where: [VAT(epsilon=EPSILON, xi=XI, weight=WEIGHT, **on(where))],
        vat(where, entropy),
    )


@pytest.fixture
def known_noise(monkeypatch):
    """VAT draws these numbers, and advances its seed."""

    def normal(shape, dtype=None, seed=None):
        seed.next()
        size = int(np.prod(shape))
        return ops.reshape(ops.convert_to_tensor(NOISE[:size], dtype), shape)

    monkeypatch.setattr(keras.random, "normal", normal)


USUAL = BACKEND == "jax"  # whether XLA compiles; some cases also run in the other mode
BOTH = ["FGM of R-Drop, output", "penalty, out", "VAT, matrix"] if BACKEND != "torch" else []


@pytest.mark.usefixtures("known_noise")
@pytest.mark.parametrize(
    ("case", "jit"), [*((c, USUAL) for c in CASES), *((c, not USUAL) for c in BOTH)]
)
def test_a_step_is_that_by_hand(case, jit):
    objectives, by_hand = CASES[case]
    plain = network()
    model = with_objective(plain, objectives())
    before = trainable(plain)
    net = Network(before, X, Y, masks(plain, jit))
    loss = regularised(by_hand(net))
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", jit_compile=jit)
    history = model.fit(X, Y, batch_size=4, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["loss"][0], loss(net), rtol=2e-6)
    if case == "R-Drop":
        p, q = net.predict(0), net.predict(1)
        both = (divergence(p, q) + divergence(q, p)) / 2
        np.testing.assert_allclose(history["divergence"][0], both, rtol=1e-5)
    for start, after, gradient in zip(
        before, trainable(plain), differences(loss, net), strict=True
    ):
        np.testing.assert_allclose(start - after, gradient, atol=3e-6)
    # The seed advances once per draw that is meant, the moving average once.
    draws = ops.convert_to_numpy(plain.get_layer("dropout").seed_generator.state)[1]
    assert draws == (2 if any(isinstance(o, RDrop) for o in model.objectives) else 1)
    mean = before[0][X].reshape(len(X), -1).mean(0)
    np.testing.assert_allclose(
        ops.convert_to_numpy(plain.get_layer("center").mean), 0.1 * mean, atol=1e-7
    )


class Again(Objective):
    """What a pass on the draws of the one before changes in the loss: nothing."""

    def __init__(self, layer="embedding"):
        self.layers = (layer,)

    def loss(self, inner, step):
        loss, y_pred = inner()
        layer = step.layer(*self.layers)
        (value,) = step.value(layer)
        with step.replaced(layer, [value]):
            again, _ = inner()
        return again - loss, y_pred


class Doubled(Objective):
    """The loss on the batch twice, the labels moved by `shift` in the second half."""

    def __init__(self, shift):
        self.shift = shift

    def loss(self, inner, step):
        x, y, weights = step.batch
        moved = (y + self.shift) % CLASSES
        batch = Batch(ops.concatenate([x, x]), ops.concatenate([y, moved]), weights)
        return inner(batch)


@pytest.mark.parametrize("jit", MODES)
def test_draws_of_no_seed_are_repeated(jit):
    """A Dropout without a seed draws from a generator of the backend."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(TOKENS, 64, name="embedding")(tokens)
    x = keras.layers.Flatten()(keras.layers.Dropout(0.5)(x))
    plain = keras.Model(tokens, keras.layers.Dense(CLASSES, "softmax")(x))
    model = with_objective(plain, [Again()])
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", jit_compile=jit)
    for loss in model.fit(X, Y, batch_size=2, epochs=3, verbose=0).history["loss"]:
        assert abs(loss) < 1e-6


class First(Objective):
    """What a second pass changes in the value of a layer: nothing, it is that of the first."""

    layers = ("dropout",)

    def loss(self, inner, step):
        layer = step.layer("dropout")
        _, y_pred = inner()
        (first,) = step.value(layer)
        inner()
        (second,) = step.value(layer)
        return ops.sum(ops.abs(first - second)), y_pred


def test_values_are_those_of_the_first_pass():
    model = with_objective(network(), [First()])
    for weight in model.weights:
        weight.regularizer = None
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    assert model.fit(X, Y, batch_size=4, verbose=0).history["loss"] == [0]


@pytest.mark.usefixtures("known_noise")
@pytest.mark.parametrize("jit", MODES)
def test_another_batch(jit):
    """`inner` on another batch, also within an attack, whose values are those of that batch."""
    plain = network()
    plain.get_layer("dropout").rate = 0.0
    objectives = [Doubled(1), FGM(epsilon=EPSILON, **on("out"))]
    model = with_objective(plain, objectives)
    before = trainable(plain)
    ones = np.ones((2 * len(X), LENGTH * SIZE))
    net = Network(before, np.concatenate([X, X]), np.concatenate([Y, (Y + 1) % 3]), [ones])
    r = EPSILON * unit(net.slope("out"))
    loss = regularised(lambda net: entropy(net) + entropy(net, out=r))
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", jit_compile=jit)
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    for start, after, gradient in zip(
        before, trainable(plain), differences(loss, net), strict=True
    ):
        np.testing.assert_allclose(start - after, gradient, atol=3e-6)


def pair_of_texts(shared):
    """One text in two inputs: an embedding in a nested model called twice, or once on both."""
    a, b = (keras.Input((LENGTH,), dtype="int32") for _ in range(2))
    embedding = keras.layers.Embedding(
        TOKENS, SIZE, name="embedding", embeddings_initializer=normal(0.7, 1)
    )
    tokens = keras.Input((None,), dtype="int32")
    encoder = keras.Model(tokens, embedding(tokens))
    both = keras.layers.Concatenate(axis=1)
    h = both([encoder(a), encoder(b)]) if shared else encoder(both([a, b]))
    x = keras.layers.Dense(HIDDEN, "tanh", kernel_initializer=normal(0.9, 2))(
        keras.layers.Reshape((2 * LENGTH * SIZE,))(h)
    )
    x = keras.layers.Dense(CLASSES, "softmax", kernel_initializer=normal(0.9, 4))(x)
    return keras.Model([a, b], x)


@pytest.mark.parametrize("where", ["matrix", "output"])
def test_a_shared_embedding_in_a_nested_model(where):
    """Both calls are attacked, with one norm."""

    def trained(shared):
        model = pair_of_texts(shared)
        objectives = [
            FGM("embedding", EPSILON, on=where),
            GradientPenalty("embedding", WEIGHT, on=where),
        ]
        model = with_objective(model, objectives)
        model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
        before = flat(model)
        model.fit([X, X[::-1]], Y, batch_size=4, shuffle=False, verbose=0)
        return before - flat(model)

    moved = trained(shared=True)
    assert np.abs(moved).max() > 0.1
    np.testing.assert_allclose(moved, trained(shared=False), atol=1e-6)


OBJECTIVES = {
    "none": lambda: [],
    "FGM of R-Drop": lambda: [FGM("embedding", 0.3), RDrop(1.0)],
    "VAT": lambda: [VAT("embedding", 0.3, on="output", seed=5)],
}


@pytest.mark.parametrize(
    ("name", "jit"), [("none", USUAL), ("VAT", USUAL), ("FGM of R-Drop", JIT)]
)
def test_accumulation_of_unequal_batches(name, jit):
    """One cycle of batches 4, 4, 2: the mean of their gradients, by their sizes."""
    x = RNG.integers(0, TOKENS, (10, LENGTH)).astype("int32")
    y = RNG.integers(0, CLASSES, 10).astype("int32")
    parts, sums = [slice(0, 4), slice(4, 8), slice(8, 10)], 0.0

    def make(optimizer):
        model = with_objective(network(), OBJECTIVES[name]())
        model.get_layer("dropout").rate = 0.0
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit)
        return model

    single = make(keras.optimizers.SGD(1.0))
    start = single.get_weights()
    for rows in parts:
        single.set_weights(start)  # the seeds of VAT go on
        single.fit(x[rows], y[rows], batch_size=4, shuffle=False, verbose=0)
        sums = sums + (rows.stop - rows.start) * (flat(network()) - flat(single))
    model = make(AccumOptimizer(ClipOptimizer(keras.optimizers.SGD(1.0), 1e6), 3))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(flat(network()) - flat(model), sums / 10, atol=2e-6)


def summary_of(model):
    lines = []
    model.summary(print_fn=lines.append)
    return [x for x in "\n".join(lines).splitlines() if "rainable params" in x]


def test_the_carrier_is_nowhere_to_be_seen(tmp_path):
    plain = network()
    model = with_objective(plain, [])
    model.compile(AccumOptimizer("adam", 2), "sparse_categorical_crossentropy")
    model.fit(X, Y, batch_size=3, verbose=0)
    assert len(model.trainable_variables) == len(plain.trainable_variables) + 1
    assert [w.path for w in model.weights] == [w.path for w in plain.weights]
    assert model.count_params() == plain.count_params()
    assert len(model.get_weights()) == len(plain.get_weights())
    assert summary_of(model) == summary_of(plain)
    model.save_weights(tmp_path / "a.weights.h5")
    plain.save_weights(tmp_path / "b.weights.h5")
    network().load_weights(tmp_path / "a.weights.h5")
    with_objective(network(), []).load_weights(tmp_path / "b.weights.h5")
    model.compile("sgd", "sparse_categorical_crossentropy")  # and away, without accumulation
    assert model.trainable_variables == plain.trainable_variables
    model.fit(X, Y, batch_size=3, verbose=0)


def test_weights_after_a_training_without_accumulation():
    """PyTorch keeps gradients of weights that it did not know at first, and adds to them."""
    x, y, rates = np.concatenate([X, X[:2]]), np.concatenate([Y, Y[:2]]), []
    for optimizer, size in (
        (AccumOptimizer(keras.optimizers.SGD(1.0), 2), 4),
        (keras.optimizers.SGD(1.0), 6),
    ):
        model = with_objective(uncoupled(), [])
        for chosen, batch in ((keras.optimizers.SGD(0.0), 3), (optimizer, size)):
            model.compile(chosen, "sparse_categorical_crossentropy")
            model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
        rates.append(flat(model))
    np.testing.assert_allclose(*rates, atol=1e-6)


def test_batch_weight():
    """A mean over tokens: the weight is what the loss was divided by."""

    def tokens(x, y, y_pred, sample_weight):
        return ops.sum(ops.cast(x > 0, "float32"))

    class MeanOverTokens(keras.losses.Loss):
        def __init__(self):
            super().__init__(reduction="sum")

        def call(self, y_true, y_pred):
            kept = ops.cast(y_true > 0, y_pred.dtype)
            return ops.sum(kept * y_pred[..., 0]) / ops.sum(kept)

    x = np.array([[1, 2, 3], [1, 0, 0], [4, 1, 0], [2, 0, 0], [1, 1, 1]], "int32")

    def moved(optimizer, batch_size, batch_weight=None):
        inputs = keras.Input((3,), dtype="int32")
        embedding = keras.layers.Embedding(5, 1, embeddings_initializer=normal(1.0, 1))
        model = with_objective(keras.Model(inputs, embedding(inputs)), [], batch_weight)
        before = model.get_weights()[0]
        model.compile(optimizer, MeanOverTokens())
        model.fit(x, x, batch_size=batch_size, shuffle=False, verbose=0)
        return before - model.get_weights()[0]

    sgd = keras.optimizers.SGD
    whole = moved(sgd(1.0), 5)
    np.testing.assert_allclose(moved(AccumOptimizer(sgd(1.0), 3), 2, tokens), whole, atol=1e-6)
    assert abs(moved(AccumOptimizer(sgd(1.0), 3), 2) - whole).max() > 1e-2
    with pytest.raises(ValueError, match="batch_weight is for an AccumOptimizer"):
        moved(sgd(1.0), 2, tokens)


def uncoupled():
    """A network whose examples do not know of each other."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    embedding = keras.layers.Embedding(
        TOKENS, SIZE, name="embedding", embeddings_initializer=normal(0.7, 1)
    )
    x = keras.layers.Flatten()(embedding(tokens))
    dense = keras.layers.Dense(CLASSES, "softmax", kernel_initializer=normal(0.9, 4))
    return keras.Model(tokens, dense(x))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_sample_weights_count_where_the_loss_divides_by_them(reduction):
    weights = np.array([3.0, 1.0, 1.0, 2.0], "float32")
    loss = keras.losses.SparseCategoricalCrossentropy(reduction=reduction)

    def moved(optimizer, size):
        model = with_objective(uncoupled(), [])
        before = flat(model)
        model.compile(optimizer, loss)
        model.fit(X, Y, sample_weight=weights, batch_size=size, shuffle=False, verbose=0)
        return before - flat(model)

    whole = moved(keras.optimizers.SGD(1.0), 4)
    parts = moved(AccumOptimizer(keras.optimizers.SGD(1.0), 2), 3)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
