"""GN, GraN and gradient penalties: their bounds, and gradients against NumPy."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference.gan import LOSSES, gradients, network, slopes
from training.test_gan import NOISE, WIDTH, X, Z, mlp, moves, numpy_weights, run

from keras_ext import backend
from keras_ext.layers.gradient_normalization import GradientNormalized
from keras_ext.training.critic_penalty import CriticPenalty
from keras_ext.training.gan import SingleLossGAN

BACKEND = keras.backend.backend()
EPSILON = 0.1


def normalised(x, weights, kind):
    score, n = network(x, weights), slopes(x, weights)
    return score / (n + np.abs(score)) if kind == "gn" else score * n / (n**2 + EPSILON)


@pytest.mark.parametrize("kind", ["gn", "gran"])
def test_slope_of_the_normalised_critic(kind):
    critic = mlp(WIDTH, 1, norm=False)
    model = GradientNormalized(critic, kind)
    score, n = network(X, numpy_weights(critic)), slopes(X, numpy_weights(critic))
    value, gradient = backend.value_and_grad(lambda x: ops.sum(model(x)))(
        ops.convert_to_tensor(X)
    )
    slope = np.linalg.norm(ops.convert_to_numpy(gradient), axis=1, keepdims=True)
    expected = (n / (n + np.abs(score))) ** 2 if kind == "gn" else n**2 / (n**2 + EPSILON)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
    outputs = ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(outputs, normalised(X, numpy_weights(critic), kind), rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(value), outputs.sum(), rtol=1e-5)
    # Only GN bounds the value itself.
    assert kind != "gn" or np.abs(outputs).max() < 1


def test_gn_does_not_know_the_scale_of_the_critic():
    critic = mlp(WIDTH, 1, norm=False)
    model = GradientNormalized(critic)
    before = ops.convert_to_numpy(model(X))
    last = critic.layers[-1]
    last.set_weights([7 * w for w in last.get_weights()])
    np.testing.assert_allclose(ops.convert_to_numpy(model(X)), before, rtol=1e-5)


def test_a_constant_critic_has_a_finite_gradient():
    critic = mlp(WIDTH, 1, norm=False)
    critic.set_weights([0 * w for w in critic.get_weights()])
    gan = SingleLossGAN(mlp(NOISE, WIDTH), GradientNormalized(critic), "wgan")
    run(gan, keras.optimizers.SGD(1e-12))
    assert all(np.isfinite(w).all() for w in gan.get_weights())


@pytest.mark.parametrize("kind", ["gn", "gran"])
def test_both_networks_learn_through_the_normalised_critic(kind):
    critic, generator = mlp(WIDTH, 1, norm=False, seed=2), mlp(NOISE, WIDTH, seed=1)
    gan = SingleLossGAN(generator, GradientNormalized(critic, kind), "non_saturating")
    gan.noise = lambda batch: ops.convert_to_tensor(Z)
    x, z = X.astype("float64"), Z.astype("float64")
    weights_g, weights_d = numpy_weights(generator), numpy_weights(critic)
    loss_d, loss_g = LOSSES["non_saturating"]
    images = network(z, weights_g)
    expected_g = gradients(
        lambda w: loss_g(None, normalised(network(z, w), weights_d, kind)), weights_g
    )
    expected_d = gradients(
        lambda w: loss_d(normalised(x, w, kind), normalised(images, w, kind)), weights_d
    )
    run(gan)
    for model, before, expected in (
        (generator, weights_g, expected_g),
        (critic, weights_d, expected_d),
    ):
        for actual, gradient in zip(moves(model, before), expected, strict=True):
            np.testing.assert_allclose(actual, gradient, atol=2e-6)


PENALTIES = {
    "gp": lambda n: np.mean((n - 1) ** 2),
    "lp": lambda n: np.mean(np.maximum(n - 1, 0) ** 2),
    "r1": lambda n: np.mean(n**2) / 2,
    "r2": lambda n: np.mean(n**2) / 2,
}


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_and_its_gradient(kind, monkeypatch):
    monkeypatch.setattr(keras.random, "uniform", lambda shape, **_: ops.full(shape, 0.25))
    critic = mlp(WIDTH, 1, norm=False, seed=2)
    critic.layers[-1].kernel.assign(3 * critic.layers[-1].kernel)  # slopes around 1
    weights = numpy_weights(critic)
    fake = np.tanh(X[::-1]).astype("float64")
    x = {"r1": X, "r2": fake}.get(kind, 0.25 * X + 0.75 * fake).astype("float64")

    def expected(weights):
        return 10 * PENALTIES[kind](slopes(x, weights))

    class Penalty(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return CriticPenalty(kind=kind)(critic, x, ops.cast(fake, "float32"))

    history = run(Penalty(critic.input, critic.output)).history
    np.testing.assert_allclose(history["loss"], expected(weights), rtol=1e-5)
    for actual, gradient in zip(
        moves(critic, weights), gradients(expected, weights), strict=True
    ):
        np.testing.assert_allclose(actual, gradient, atol=2e-5)


def test_wgan_gp_in_fit():
    gan = SingleLossGAN(
        mlp(NOISE, WIDTH), mlp(WIDTH, 1, norm=False), "wgan", CriticPenalty(), seed=0
    )
    mode = "xla" if BACKEND == "jax" else "eager"
    history = run(gan, keras.optimizers.Adam(0.01), mode).history
    assert history["loss"][0] > history["discriminator_loss"][0]
    assert ops.convert_to_numpy(gan.seed_generator.state)[1] == 2  # noise, and u


def test_config_round_trip(tmp_path):
    gan = SingleLossGAN(
        mlp(NOISE, WIDTH),
        GradientNormalized(mlp(WIDTH, 1, norm=False), "gran", 0.2),
        penalty=CriticPenalty(2.0, "lp"),
    )
    gan.save(tmp_path / "gan.keras")
    loaded = keras.saving.load_model(tmp_path / "gan.keras")
    critic, penalty = loaded.discriminator, loaded.penalty
    assert (critic.kind, critic.epsilon) == ("gran", 0.2)
    assert penalty.get_config() == {"weight": 2.0, "kind": "lp"}
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(X)), ops.convert_to_numpy(gan(X)))


def test_what_does_not_fit_is_told():
    critic = mlp(WIDTH, 1)
    for call in (
        lambda: GradientNormalized(critic),
        lambda: CriticPenalty()(keras.Sequential([critic]), X, X),
    ):
        with pytest.raises(ValueError, match=r"normalises over the batch. Use LayerNorm"):
            call()
    smooth = keras.Sequential([keras.Input((3,)), layers.Dense(1, activation="silu")])
    with pytest.warns(UserWarning, match="has the activation 'silu'"):
        GradientNormalized(smooth)
    plain = mlp(WIDTH, 1, norm=False)
    for call, message in (
        (lambda: GradientNormalized(plain, "gm"), 'kind must be "gn" or "gran", got \'gm\''),
        (lambda: GradientNormalized(plain, epsilon=0), "epsilon must be positive, got 0"),
        (lambda: CriticPenalty(0), "weight must be positive, got 0"),
        (lambda: CriticPenalty(kind="r3"), "kind must be one of .* got 'r3'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
