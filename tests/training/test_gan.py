"""SingleLossGAN: the gradients of two losses, one draw, state that moves as it should."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference.gan import LOSSES, gradients, network

from keras_ext.losses.gan import GANQP, Hinge, Relativistic
from keras_ext.optimizers import MultiplierOptimizer
from keras_ext.training.gan import SingleLossGAN

BACKEND = keras.backend.backend()
JIT = BACKEND != "torch"
MODES = ["eager", "xla"] if JIT else ["eager"]
BATCH, NOISE, WIDTH = 6, 2, 3
X = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32")
Z = np.random.default_rng(1).normal(size=(BATCH, NOISE)).astype("float32")
OBJECTS = {"relativistic_average": Relativistic(average=True), "gan_qp_l1": GANQP(norm="l1")}


def mlp(inputs, outputs, norm=True, dropout=0.0, seed=0, **options):
    """The network of the reference, with random weights throughout."""
    x = keras.Input((inputs,))
    h = layers.Dense(4, **options)(x)
    if norm:
        h = layers.BatchNormalization()(h)
    if dropout:
        h = layers.Dropout(dropout, seed=5)(h)
    h = layers.LeakyReLU(0.2)(h)
    model = keras.Model(x, layers.Dense(outputs)(h))
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.5))
    return model


def build(loss="hinge", norm=True, dropout=0.0, fixed_noise=True, regularizer=None, **options):
    generator = mlp(NOISE, WIDTH, norm, seed=1)
    critic = mlp(WIDTH, 1, norm, dropout, seed=2, kernel_regularizer=regularizer)
    gan = SingleLossGAN(generator, critic, loss, **options)
    if fixed_noise:
        gan.noise = lambda batch: ops.convert_to_tensor(Z[:batch])
    return gan


def run(gan, optimizer=None, mode="eager", steps=1):
    options = {"run_eagerly": True} if mode == "eager" else {"jit_compile": JIT}
    optimizer = keras.optimizers.SGD(1.0) if optimizer is None else optimizer
    gan.compile(optimizer=optimizer, **options)
    return gan.fit(X, batch_size=BATCH, epochs=steps, shuffle=False, verbose=0)


def numpy_weights(model):
    return [ops.convert_to_numpy(w).astype("float64") for w in model.trainable_weights]


def moves(model, before):
    return [old - new for old, new in zip(before, numpy_weights(model), strict=True)]


def two_losses(name, generator, discriminator):
    """The gradients of L_G to the generator and of L_D to the discriminator, in float64."""
    loss_d, loss_g = LOSSES[name]
    x, z = X.astype("float64"), Z.astype("float64")
    images, real = network(z, generator), network(x, discriminator)

    def of_generator(weights):
        return loss_g(real, network(network(z, weights), discriminator))

    def of_discriminator(weights):
        return loss_d(network(x, weights), network(images, weights), x, images)

    return gradients(of_generator, generator), gradients(of_discriminator, discriminator)


CASES = [(name, "eager") for name in LOSSES] + [("hinge", mode) for mode in MODES[1:]]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_gradients_are_those_of_the_two_losses(name, mode):
    gan = build(OBJECTS.get(name, name))
    networks = (gan.generator, gan.discriminator)
    before = [numpy_weights(n) for n in networks]
    run(gan, mode=mode)
    for model, old, expected in zip(networks, before, two_losses(name, *before), strict=True):
        for actual, gradient in zip(moves(model, old), expected, strict=True):
            np.testing.assert_allclose(actual, gradient, atol=1e-6)


class Louder(Hinge):
    """A generator's loss times a hundred, or none."""

    def __init__(self, factor):
        self.factor = factor

    def generator(self, real, fake):
        return self.factor * super().generator(real, fake)


@pytest.mark.parametrize("mode", ["xla" if BACKEND == "jax" else "eager"])
def test_no_gradient_leaks_into_the_discriminator(mode):
    ends = []
    for factor in (0.0, 100.0):
        gan = build(Louder(factor), dropout=0.5)
        before = numpy_weights(gan.generator)
        run(gan, mode=mode)
        assert any(m.any() for m in moves(gan.generator, before)) == (factor > 0)
        ends.append(numpy_weights(gan.discriminator))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_batch_is_seen_once():
    gan = build(fixed_noise=False, dropout=0.5, seed=0)
    real, norm = gan.discriminator.layers[1], gan.discriminator.layers[2]
    mean = X @ ops.convert_to_numpy(real.kernel) + ops.convert_to_numpy(real.bias)
    run(gan, keras.optimizers.SGD(0.0), steps=3)
    seeds = [gan.seed_generator, gan.discriminator.layers[3].seed_generator]
    states = [int(ops.convert_to_numpy(s.state)[1]) for s in seeds]
    assert states == [3, 6]  # noise once, dropout for real and for generated images
    # After 6 updates, half of them with images that the generator makes of the noise.
    variance = ops.convert_to_numpy(norm.moving_variance)
    assert mean.shape == (BATCH, 4)
    assert (variance > 0.99**6).all()
    assert (variance < 0.99**6 + 20).all()


def test_history_evaluation_and_a_smaller_last_batch():
    gan = build(fixed_noise=False, seed=0)
    gan.compile(optimizer="adam")
    history = gan.fit(X, batch_size=4, epochs=2, verbose=0).history
    assert set(history) == {"loss", "discriminator_loss", "generator_loss"}
    np.testing.assert_allclose(history["loss"], history["discriminator_loss"], rtol=0.2)
    logs = gan.evaluate(X, verbose=0, return_dict=True)
    assert set(logs) == set(history)
    assert np.isfinite(list(logs.values())).all()
    np.testing.assert_allclose(
        gan.predict(X, verbose=0), gan.discriminator.predict(X, verbose=0)
    )


def test_noise_is_standard_normal_and_seeded():
    gans = [build(fixed_noise=False, seed=3) for _ in range(2)]
    noise = [ops.convert_to_numpy(gan.noise(4000)) for gan in gans]
    np.testing.assert_array_equal(*noise)
    assert noise[0].shape == (4000, NOISE)
    np.testing.assert_allclose(np.cov(noise[0].T), np.eye(NOISE), atol=0.1)
    again = ops.convert_to_numpy(gans[0].noise(4000))
    assert abs(np.corrcoef(noise[0][:, 0], again[:, 0])[0, 1]) < 0.1
    assert gans[0].generate(5, batch_size=2).shape == (5, WIDTH)


def test_resume_in_the_middle(tmp_path):
    gan = build("non_saturating", norm=False, fixed_noise=False, seed=3)
    run(gan, keras.optimizers.Adam(0.1), steps=2)
    gan.save(tmp_path / "gan.keras")
    loaded = keras.saving.load_model(tmp_path / "gan.keras")
    for model in (gan, loaded):
        model.fit(X, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(gan.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_pace_is_set_by_the_learning_rate():
    ends = []
    for factor in (1.0, 0.25):
        gan = build()
        networks = (gan.generator, gan.discriminator)
        before = [numpy_weights(n) for n in networks]
        adam = keras.optimizers.Adam(0.01, epsilon=1e-12)
        run(gan, MultiplierOptimizer(adam, {gan.generator: factor}))
        ends.append([moves(n, b) for n, b in zip(networks, before, strict=True)])
    for (g, d), (g_slow, d_same) in [ends]:
        for a, b in zip(d, d_same, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(g, g_slow, strict=True):
            np.testing.assert_allclose(0.25 * a, b, atol=1e-7)


def test_weight_of_the_loss_does_nothing_under_adam():
    ends = []
    for factor in (1.0, 10.0):
        gan = build(Louder(factor), norm=False)
        run(gan, keras.optimizers.Adam(0.01, epsilon=1e-12), steps=3)
        ends.append(numpy_weights(gan.generator))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_weight_regularisers_count():
    gan, plain = build(regularizer=keras.regularizers.L2(0.5)), build()
    before = numpy_weights(gan.discriminator)
    for model in (gan, plain):
        run(model)
    pairs = zip(gan.discriminator.weights, plain.discriminator.weights, strict=True)
    regularised, without = next(pairs)
    difference = ops.convert_to_numpy(without) - ops.convert_to_numpy(regularised)
    np.testing.assert_allclose(difference, before[0], atol=1e-6)


def test_mixed_precision():
    generator = mlp(NOISE, WIDTH, dtype="mixed_bfloat16")
    gan = SingleLossGAN(generator, mlp(WIDTH, 1, dtype="mixed_bfloat16"), "gan_qp")
    history = run(gan, keras.optimizers.Adam(0.01), steps=2).history
    assert np.isfinite(history["loss"]).all()
    assert {w.dtype for w in gan.trainable_weights} == {"float32"}


@pytest.mark.skipif(BACKEND == "torch", reason="Keras overwrites a kernel that torch needs")
def test_spectral_normalization():
    x = keras.Input((WIDTH,))
    h = layers.LeakyReLU()(layers.SpectralNormalization(layers.Dense(4))(x))
    critic = keras.Model(x, layers.SpectralNormalization(layers.Dense(1))(h))
    gan = SingleLossGAN(mlp(NOISE, WIDTH), critic, "wgan")
    history = run(gan, keras.optimizers.SGD(0.01), steps=3).history
    assert np.isfinite(history["loss"]).all()


def test_errors():
    gan = build()
    gan.compile(optimizer="adam")
    with pytest.raises(ValueError, match=r"no use for targets. Call fit\(images\)"):
        gan.compute_loss(X, X, X)
    with pytest.raises(ValueError, match="no use for sample weights"):
        gan.compute_loss(X, None, X, sample_weight=np.ones(BATCH))
    gan.compile(optimizer="adam", loss="mse")
    with pytest.raises(ValueError, match=r"in the constructor, got compile\(loss='mse'\)"):
        gan.compute_loss(X, None, X)
    with pytest.raises(ValueError, match="loss must be one of"):
        build("mse")
    two = [keras.Input((2,)), keras.Input((2,))]
    for generator in (
        keras.Model(two, layers.Add()(two)),
        keras.Sequential([layers.Dense(3)]),
    ):
        with pytest.raises(ValueError, match="generator must have one input of known shape"):
            SingleLossGAN(generator, gan.discriminator)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(mirrored):
    ends = []
    for strategy in (None, mirrored):
        with strategy.scope() if strategy else keras.name_scope("alone"):
            gan = build(norm=False)
            gan.noise = lambda batch: ops.convert_to_tensor(Z[:3])
            x = X[:3] if strategy is None else np.concatenate([X[:3], X[:3]])
            gan.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
        gan.fit(x, batch_size=len(x), verbose=0)
        ends.append(gan.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
