"""BiGANQP: its gradients are those of two losses; codes and images invert each other."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference.gan import gradients, network, qp_distance
from training.test_gan import NOISE, WIDTH, X, Z, mlp, moves, numpy_weights, run

from keras_ext.training.bigan_qp import BiGANQP


def build(**options):
    image, code = keras.Input((WIDTH,)), keras.Input((NOISE,))
    pair = mlp(WIDTH + NOISE, 1, seed=3)
    critic = keras.Model([image, code], pair(layers.Concatenate()([image, code])))
    return BiGANQP(mlp(NOISE, WIDTH, seed=1), mlp(WIDTH, NOISE, seed=2), critic, **options)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_are_those_of_the_two_losses(norm):
    model = build(norm=norm, scale=4.0)
    model_noise = ops.convert_to_tensor(Z)
    model.noise = lambda batch: model_noise
    networks = [model.generator, model.encoder, model.discriminator]
    g, e, t = map(numpy_weights, networks)
    x, z = X.astype("float64"), Z.astype("float64")
    images, codes = network(z, g), network(x, e)

    def delta(codes, images, t):
        real = network(np.concatenate([x, codes], 1), t)
        return real - network(np.concatenate([images, z], 1), t)

    def of_pair(weights):
        g, e = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        inverse = 2 * np.mean((z - network(images, e)) ** 2)
        inverse += 3 * np.mean((x - network(codes, g)) ** 2)
        return delta(network(x, e), network(z, g), t).mean() + inverse

    def of_discriminator(weights):
        difference = delta(codes, images, weights)
        d = qp_distance(x, images, norm) + qp_distance(codes, z, norm)
        return np.mean(-difference + difference**2 / (2 * 4 * (d[:, None] + 1e-6)))

    of_both = gradients(of_pair, [*g, *e])
    expected = [of_both[: len(g)], of_both[len(g) :], gradients(of_discriminator, t)]
    run(model)
    for network_, before, wanted in zip(networks, (g, e, t), expected, strict=True):
        for actual, gradient in zip(moves(network_, before), wanted, strict=True):
            np.testing.assert_allclose(actual, gradient, atol=3e-6)


def test_fit_predict_and_load(tmp_path):
    model = build(seed=0, image_weight=4.0)
    history = run(model, keras.optimizers.Adam(0.01), steps=2).history
    assert set(history) == {"loss", "discriminator_loss", "generator_loss"}
    assert np.isfinite(model.evaluate(X, verbose=0)).all()
    model.save(tmp_path / "bigan.keras")
    loaded = keras.saving.load_model(tmp_path / "bigan.keras")
    assert loaded.image_weight == 4.0
    codes = model.predict(X, verbose=0)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), codes)
    assert codes.shape == Z.shape


def test_errors():
    for options, message in (
        ({"scale": 0}, "scale must be positive, got 0"),
        ({"epsilon": 0}, "epsilon must be positive, got 0"),
        ({"code_weight": -1}, "code_weight must be at least 0, got -1"),
        ({"norm": "l3"}, 'norm must be "l1" or "l2", got \'l3\''),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    model = build()
    with pytest.raises(ValueError, match=r"codes of the shape \(2,\) .* got \(3,\)"):
        BiGANQP(model.generator, mlp(WIDTH, 3), model.discriminator)
