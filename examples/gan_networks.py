"""Data and small networks for examples/gan.py: a DCGAN for digits, an MLP for points."""

import gzip
from pathlib import Path

import keras
import numpy as np
from keras import layers

from keras_ext.layers.gradient_normalization import GradientNormalized

MODES, SPREAD = 8, 0.02


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images in [-1, 1], (n, 28, 28, 1), and labels of all MNIST image files in the folder."""
    images, labels = [], []
    for path in sorted(folder.glob("*-images-idx3-ubyte.gz")):
        raw = gzip.decompress(path.read_bytes())[16:]
        images.append(np.frombuffer(raw, "uint8").reshape(-1, 28, 28, 1))
        name = path.name.replace("images-idx3", "labels-idx1")
        labels.append(np.frombuffer(gzip.decompress((folder / name).read_bytes())[8:], "uint8"))
    if not images:
        raise SystemExit(
            f"{folder} holds no MNIST images (t10k-images-idx3-ubyte.gz or "
            "train-images-idx3-ubyte.gz, and their labels)."
        )
    return np.concatenate(images).astype("float32") / 127.5 - 1, np.concatenate(labels)


def centers() -> np.ndarray:
    """Means of the mixture: eight points on a circle."""
    angles = 2 * np.pi * np.arange(MODES) / MODES
    return 0.7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def read_mixture(count: int = 51_200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = centers()[rng.integers(MODES, size=count)]
    return (points + SPREAD * rng.normal(size=(count, 2))).astype("float32")


def digit_networks(critic: str) -> tuple[keras.Model, keras.Model]:
    """Generator of 64 numbers, and discriminator, of the kind that `critic` says."""
    noise = keras.Input((64,))
    x = layers.Dense(7 * 7 * 48, use_bias=False)(noise)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Reshape((7, 7, 48))(x)
    x = layers.Conv2DTranspose(24, 4, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh")(x)
    generator = keras.Model(noise, x)

    image = keras.Input((28, 28, 1))
    wrap = layers.SpectralNormalization if critic == "sn" else lambda layer: layer
    x = wrap(layers.Conv2D(24, 4, strides=2, padding="same"))(image)
    x = wrap(layers.Conv2D(48, 4, strides=2, padding="same"))(layers.LeakyReLU(0.2)(x))
    x = wrap(layers.Dense(1))(layers.Flatten()(layers.LeakyReLU(0.2)(x)))
    return generator, normalised(keras.Model(image, x), critic)


def mixture_networks(critic: str) -> tuple[keras.Model, keras.Model]:
    """The same for points: two hidden layers of 64 each."""
    noise = keras.Input((4,))
    x = noise
    for _ in range(2):
        x = layers.Dense(64, activation="relu")(x)
    generator = keras.Model(noise, layers.Dense(2)(x))

    point = keras.Input((2,))
    wrap = layers.SpectralNormalization if critic == "sn" else lambda layer: layer
    x = point
    for _ in range(2):
        x = layers.LeakyReLU(0.2)(wrap(layers.Dense(64))(x))
    return generator, normalised(keras.Model(point, wrap(layers.Dense(1))(x)), critic)


def normalised(discriminator: keras.Model, critic: str) -> keras.Model:
    if critic in ("gn", "gran"):
        return GradientNormalized(discriminator, critic)
    return discriminator
