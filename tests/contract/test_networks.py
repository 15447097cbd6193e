"""One contract for the models that own networks: what a user does before and after `fit`."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import training
from keras_ext.layers import FeedForward, GradientNormalized, TheseusModule
from keras_ext.layers.theseus import ReplacementRate
from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import (
    BiGANQP,
    CriticPenalty,
    RDrop,
    SingleLossGAN,
    with_objective,
)
from keras_ext.training.theseus import TheseusModel

NOISE, WIDTH = 2, 4
X = np.random.default_rng(0).normal(size=(8, WIDTH)).astype("float32")
Y = np.arange(8) % 3


def dense(inputs, outputs, name):
    x = keras.Input((inputs,))
    h = keras.layers.Dense(6, "leaky_relu")(x)
    return keras.Model(x, keras.layers.Dense(outputs)(h), name=name)


def critic():
    return dense(WIDTH, 1, "critic")


def gan(discriminator, **options):
    generator = dense(NOISE, WIDTH, "generator")
    return SingleLossGAN(generator, discriminator, seed=1, **options)


def bigan():
    image, code = keras.Input((WIDTH,)), keras.Input((NOISE,))
    pair = keras.layers.Concatenate()([image, code])
    discriminator = keras.Model([image, code], keras.layers.Dense(1)(pair))
    generator = dense(NOISE, WIDTH, "generator")
    return BiGANQP(generator, dense(WIDTH, NOISE, "encoder"), discriminator, seed=1)


def theseus(objectives=()):
    """What build_theseus_model makes of a model, in small."""
    x = keras.Input((1, WIDTH))
    module = TheseusModule(FeedForward(8), FeedForward(4), seed=3)
    h = module(x, ReplacementRate(1.0)(x))
    h = keras.layers.Dropout(0.2, seed=4)(keras.layers.Flatten()(h))
    model = TheseusModel(x, keras.layers.Dense(3, "softmax")(h))
    return with_objective(model, list(objectives))


ROWS = {
    "SingleLossGAN": lambda: gan(critic()),
    "SingleLossGAN, CriticPenalty": lambda: gan(critic(), penalty=CriticPenalty(2.0, "r1")),
    "SingleLossGAN, GradientNormalized": lambda: gan(GradientNormalized(critic(), "gran")),
    "BiGANQP": bigan,
    "TheseusModel": theseus,
    "TheseusModel, RDrop": lambda: theseus([RDrop(1.0)]),
}


def compiled(name, optimizer=None):
    keras.utils.set_random_seed(0)
    model = ROWS[name]()
    loss = {"loss": "sparse_categorical_crossentropy"} if "Theseus" in name else {}
    model.compile(optimizer or keras.optimizers.SGD(0.05), **loss)
    return model


def data(name):
    return (X[:, None], Y) if "Theseus" in name else (X,)


def fit(model, name, **options):
    return model.fit(*data(name), batch_size=4, shuffle=False, verbose=0, **options).history


def test_every_network_has_a_row():
    public = (getattr(training, name) for name in training.__all__)
    models = {c.__name__ for c in public if isinstance(c, type) and issubclass(c, keras.Model)}
    assert models == {name.split(",")[0] for name in ROWS} - {"TheseusModel"}


@pytest.mark.parametrize("name", ROWS)
def test_saved_whole_it_goes_on(name, tmp_path):
    model = compiled(name, keras.optimizers.Adam(0.01))
    fit(model, name)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = data(name)[0]
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) == 2
    assert loaded.get_config().keys() == model.get_config().keys()
    before = [np.array(w) for w in loaded.get_weights()]
    history = fit(loaded, name)
    assert history.keys() == fit(model, name).keys()
    assert all(np.isfinite(values).all() for values in history.values())
    assert any((a != b).any() for a, b in zip(before, loaded.get_weights(), strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_weights_load_in_a_new_model(name, tmp_path):
    model = compiled(name)
    fit(model, name)
    model.save_weights(tmp_path / "a.weights.h5")
    other = ROWS[name]()
    other.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ROWS)
def test_a_frozen_network_stays_and_the_rest_learns(name):
    model = compiled(name)
    fit(model, name)
    frozen = model.layers[-1] if "Theseus" in name else model.layers[0]
    frozen.trainable = False
    assert frozen.weights
    optimizer = keras.optimizers.SGD(0.05)
    model.compile(optimizer, model.loss)
    still = {id(w): np.array(ops.convert_to_numpy(w)) for w in frozen.weights}
    before = [np.array(ops.convert_to_numpy(w)) for w in model.trainable_weights]
    fit(model, name, epochs=2)
    for weight in frozen.weights:
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), still[id(weight)])
    after = [ops.convert_to_numpy(w) for w in model.trainable_weights]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_accumulation(name):
    """Two batches make one update; a carrier of weights is nowhere in the files."""
    model = compiled(name, AccumOptimizer(keras.optimizers.SGD(0.05), 2))
    count = model.count_params()
    fit(model, name)
    assert int(model.optimizer.iterations) == 1
    assert model.count_params() == count


@pytest.mark.parametrize("name", ROWS)
def test_evaluation_and_unknown_keywords(name):
    model = compiled(name)
    fit(model, name)
    before = [np.array(w) for w in model.get_weights()]
    figures = model.evaluate(*data(name), verbose=0, return_dict=True)
    assert all(np.isfinite(value) for value in figures.values())
    assert "divergence" not in figures
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    if "Theseus" not in name:  # a graph, as any of Keras
        config = model.get_config()
        with pytest.raises((TypeError, ValueError), match="no_such_option"):
            type(model).from_config(config | {"no_such_option": 1})
