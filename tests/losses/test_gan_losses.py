"""Losses of GANs: both parts against NumPy, and what GAN-QP promises."""

import keras
import numpy as np
import pytest
from keras import ops
from reference.gan import LOSSES, qp_distance

from keras_ext import backend
from keras_ext.losses import gan

OBJECTS = {
    **{name: gan.get(name) for name in gan.LOSSES},
    "relativistic_average": gan.Relativistic(average=True),
    "gan_qp_l1": gan.GANQP(norm="l1"),
}
RNG = np.random.default_rng(0)
R, F = (RNG.normal(size=(6, 1), scale=2).astype("float32") for _ in range(2))
X, G = (RNG.normal(size=(6, 2, 3)).astype("float32") for _ in range(2))


@pytest.mark.parametrize("name", LOSSES)
def test_both_parts_are_those_of_the_reference(name):
    loss, (discriminator, generator) = OBJECTS[name], LOSSES[name]
    r, f, x, g = (a.astype("float64") for a in (R, F, X, G))
    actual = [loss.discriminator(R, F, X, G), loss.generator(R, F)]
    np.testing.assert_allclose(
        [float(a) for a in actual], [discriminator(r, f, x, g), generator(r, f)], rtol=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_config_round_trip(name):
    config = keras.saving.serialize_keras_object(OBJECTS[name])
    copy = keras.saving.deserialize_keras_object(config)
    assert config["registered_name"].startswith("keras_ext>")
    assert copy.get_config() == OBJECTS[name].get_config()
    assert type(copy) is type(OBJECTS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_scores_are_summed_in_float32(name):
    r, f = (ops.cast(s, "bfloat16") for s in (R, F))
    exact = [ops.convert_to_numpy(ops.cast(s, "float32")) for s in (r, f)]
    for part, more in (("discriminator", (X, G)), ("generator", ())):
        value = getattr(OBJECTS[name], part)(r, f, *more)
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        expected = float(getattr(OBJECTS[name], part)(*exact, *more))
        np.testing.assert_allclose(float(value), expected, rtol=1e-6)


def finite_space(seed=0):
    """All pairs of two distributions on four points, with their multiplicities."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(4, 3))
    p, q = np.array([1, 2, 2, 3]) / 8, np.array([4, 2, 1, 1]) / 8
    pairs = p[:, None] * q[None, :]
    counts = np.rint(64 * pairs).astype(int).ravel()
    i, j = (np.repeat(index.ravel(), counts) for index in np.indices((4, 4)))
    return pairs, points, i, j


def test_gan_qp_at_its_optimum():
    pairs, points, i, j = finite_space()
    scale, loss = 2.0, gan.GANQP(scale=2.0, epsilon=1e-12)
    d = np.array([qp_distance(np.repeat(a[None], 4, 0), points) for a in points])
    best = scale * d * (pairs - pairs.T) / (pairs + pairs.T)
    assert (np.abs(best) <= scale * d).all()

    def value(difference):  # of a batch with every pair as often as it is drawn
        difference = difference[i, j].astype("float32")
        return float(loss.discriminator(difference, 0 * difference, points[i], points[j]))

    off_diagonal = (i != j) | (d[i, j] > 0)  # d = 0 on the diagonal, where best is 0, too
    assert not off_diagonal.all()
    divergence = scale / 4 * np.sum(d * (pairs - pairs.T) ** 2 / (pairs + pairs.T))
    np.testing.assert_allclose(-value(best), divergence, rtol=1e-5)
    np.testing.assert_allclose(best[i, j].mean(), 2 * divergence, rtol=1e-12)
    # Antisymmetric functions of the pair are what the optimum is taken over.
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=(4, 4)) * 0.1
        assert value(best + noise - noise.T) > -divergence


def test_gan_qp_pairs_are_constants():
    loss = gan.GANQP()
    x_fake = ops.convert_to_tensor(G)
    _, gradient = backend.value_and_grad(lambda g: loss.discriminator(R, F, X, g))(x_fake)
    assert not ops.convert_to_numpy(gradient).any()
    same = float(loss.discriminator(R, R, X, X))  # d = 0
    assert same == 0


def test_errors():
    with pytest.raises(
        ValueError, match=r"loss must be one of \['gan_qp', 'hinge'.*got 'hing'"
    ):
        gan.get("hing")
    with pytest.raises(ValueError, match="pass x_real and x_fake"):
        gan.GANQP().discriminator(R, F)
    for options, message in (
        ({"scale": 0}, "scale must be positive, got 0"),
        ({"norm": 2}, 'norm must be "l1" or "l2", got 2'),
        ({"epsilon": 0}, "epsilon must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gan.GANQP(**options)
