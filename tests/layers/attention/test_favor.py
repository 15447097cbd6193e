"""Random features: unbiased, with the variance of the theory, and drawn anew when asked."""

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext.layers import (
    FavorAttention,
    MultiHeadAttention,
    orthogonal_projection,
    random_features,
)
from keras_ext.training import RedrawFeatures

SIZE = 4
RNG = np.random.default_rng(0)
KINDS = ("positive", "hyperbolic", "trigonometric")
Q = np.array([0.3, -0.2, 0.1, 0.3])
K = np.array([0.1, 0.2, -0.1, 0.3])
TRUE = np.exp(Q @ K)


def estimates(kind, projections, q=Q, k=K):
    """Of exp(q·k), by each of many projections (draws, rows, size)."""
    rows = projections.reshape(-1, SIZE).astype("float32")
    q, k = (
        ops.convert_to_numpy(random_features(x[None].astype("float32"), rows, kind))[0]
        for x in (q, k)
    )
    products = (q * k).astype("float64") * len(rows)  # of single features
    if kind != "positive":
        products = products.reshape(2, -1).sum(0)
    return products.reshape(len(projections), -1).mean(-1)


def independent(draws, rows):
    return RNG.normal(size=(draws, rows, SIZE))


def orthogonal(blocks):
    """Many blocks of `SIZE` orthogonal rows."""
    drawn = orthogonal_projection(blocks * SIZE, SIZE, seed=7)
    return ops.convert_to_numpy(drawn).reshape(blocks, SIZE, SIZE)


def assert_unbiased(values):
    assert abs(values.mean() - TRUE) < 4 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased(kind):
    assert ((Q + K) ** 2).sum() < 0.6  # farther out the tails are too heavy to test
    assert_unbiased(estimates(kind, independent(20_000, 4)))
    assert_unbiased(estimates(kind, orthogonal(20_000)))


def test_without_the_sign_of_r_it_is_biased():
    q, _ = np.linalg.qr(RNG.normal(size=(20_000, SIZE, SIZE)))
    lengths = np.linalg.norm(RNG.normal(size=q.shape), axis=-1, keepdims=True)
    first = np.array([0.5, 0, 0, 0])
    values = estimates("positive", q * lengths, first, first) / np.exp(0.25)
    assert 0.80 < values.mean() < 0.85


def test_variance_of_independent_rows():
    z, delta = ((Q + K) ** 2).sum(), ((Q - K) ** 2).sum()
    laws = {
        "positive": np.exp(z) * TRUE**2 * (1 - np.exp(-z)),
        "hyperbolic": np.exp(z) * TRUE**2 * (1 - np.exp(-z)) ** 2 / 2,
        "trigonometric": np.exp(z) / TRUE**2 * (1 - np.exp(-delta)) ** 2 / 2,
    }
    for kind, law in laws.items():
        error = (estimates(kind, independent(100_000, 1)) - TRUE) ** 2
        assert abs(error.mean() - law) < 4 * error.std() / np.sqrt(len(error)), kind


def test_orthogonal_rows_have_less_variance():
    error = [
        ((estimates("positive", rows) - TRUE) ** 2).mean()
        for rows in (orthogonal(20_000), independent(200_000, SIZE))
    ]
    assert error[0] < 0.96 * error[1]  # 0.92, with a standard error below 0.01


def test_rows_are_orthogonal_in_blocks_and_long_as_normal_ones():
    rows = ops.convert_to_numpy(orthogonal_projection(10, SIZE, seed=0))
    assert rows.shape == (10, SIZE)
    gram = rows[:8].reshape(2, 4, 4) @ rows[:8].reshape(2, 4, 4).transpose(0, 2, 1)
    off = gram * (1 - np.eye(4))
    np.testing.assert_allclose(off, 0, atol=1e-5)
    squares = (orthogonal(20_000) ** 2).sum(-1)  # chi-squared with 4 degrees of freedom
    np.testing.assert_allclose([squares.mean(), squares.var()], [4, 8], rtol=0.03)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_softmax_attention(kind, causal):
    exact = MultiHeadAttention(2, SIZE, causal=causal)
    favor = FavorAttention(2, SIZE, causal=causal, num_features=4096, kind=kind, seed=0)
    x = 0.3 * RNG.normal(size=(2, 7, 8)).astype("float32")
    mask = np.arange(7) < [[7], [5]]
    exact.build(x.shape, x.shape)
    favor.build(x.shape, x.shape)
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        getattr(favor, name).set_weights(getattr(exact, name).get_weights())
    expected, outputs = (
        ops.convert_to_numpy(compiled(lambda x, layer=layer: layer(x, x, value_mask=mask))(x))
        for layer in (exact, favor)
    )
    np.testing.assert_allclose(outputs, expected, atol=0.05)
    assert np.abs(outputs - expected).max() > 1e-6  # an estimate


def test_extreme_keys_and_queries_stay_finite():
    layer = FavorAttention(2, SIZE, num_features=8, causal=True)
    x = 100 * RNG.normal(size=(2, 7, 8)).astype("float32")
    assert np.isfinite(ops.convert_to_numpy(compiled(lambda x: layer(x, x))(x))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole(kind):
    keras.utils.set_random_seed(0)
    layer = FavorAttention(2, SIZE, causal=True, num_features=16, kind=kind, seed=3)
    x = np.random.default_rng(1).normal(size=(2, 6, 8)).astype("float32")
    layer.build(x.shape, x.shape)
    whole = ops.convert_to_numpy(compiled(lambda x: layer(x, x))(x))
    state, step = layer.initial_state(2), compiled(layer.step)
    for i in range(6):
        output, state = step(x[:, i : i + 1], state)
        tolerance = 1e-3 if kind == "trigonometric" else 1e-5  # its normaliser may be small
        np.testing.assert_allclose(
            ops.convert_to_numpy(output)[:, 0], whole[:, i], atol=tolerance
        )


class Watch(keras.callbacks.Callback):
    """What the projection is before each batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self.seen.append(ops.convert_to_numpy(self.layer.projection).copy())


@pytest.mark.parametrize("jit_compile", [True, False])
def test_redraw_while_training(jit_compile):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("there it means torch.compile, which needs minutes")
    layer = FavorAttention(1, 4, num_features=4, seed=0)
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layer(inputs, inputs))
    model.compile("sgd", "mse", jit_compile=jit_compile)
    kernel = layer.query_dense.get_weights()[0]
    watch = Watch(layer)
    x = RNG.normal(size=(10, 3, 4)).astype("float32")
    model.fit(x, x, 2, epochs=2, verbose=0, callbacks=[watch, RedrawFeatures(every=4)])
    seen = [w.tobytes() for w in watch.seen]  # of 10 batches in two epochs, each after its step
    assert [seen.index(w) for w in seen] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert (layer.query_dense.get_weights()[0] != kernel).any()  # and the training went on
    assert not layer.projection.trainable


def test_a_model_without_favor_is_an_error():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has no FavorAttention"):
        model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0, callbacks=[RedrawFeatures()])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FavorAttention(2, 4, kind="cosine"), "kind must be one of .* got 'cosine'"),
        (lambda: FavorAttention(2, 4, num_features=0), "num_features must be positive, got 0"),
        (
            lambda: FavorAttention(2, 4, num_features=5, kind="hyperbolic"),
            "num_features must be even and positive, got 5",
        ),
        (lambda: RedrawFeatures(0), "every must be positive, got 0"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
