"""How good are samples? FID for digits, modes for points; and pictures of both."""

from pathlib import Path

import keras
import matplotlib
import numpy as np
from keras import layers

matplotlib.use("Agg")
from gan_networks import SPREAD, centers
from matplotlib import image as mpl_image
from matplotlib import pyplot as plt


class FID:
    """Fréchet distance in the features of a small classifier of the same images.

        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))

    with mean and covariance of 64 features. Compare such figures with each other only: the
    features are not those of the Inception network.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.classifier = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(32, 3, strides=2, activation="relu"),
                layers.Conv2D(64, 3, strides=2, activation="relu"),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.classifier.compile("adam", loss, metrics=["accuracy"])
        history = self.classifier.fit(
            images, labels, batch_size=64, epochs=4, verbose=0
        ).history
        self.accuracy = history["accuracy"][-1]
        self.features = keras.Model(self.classifier.inputs, self.classifier.layers[-2].output)
        self.real = self._moments(images)
        halves = np.random.default_rng(0).permutation(images).reshape(2, -1, 28, 28, 1)
        self.floor = frechet(*map(self._moments, halves))  # two halves of the real images

    def __call__(self, images: np.ndarray) -> float:
        return frechet(self.real, self._moments(images))

    def _moments(self, images):
        features = self.features.predict(images, batch_size=256, verbose=0).astype("float64")
        return features.mean(0), np.cov(features.T)


def frechet(a: tuple, b: tuple) -> float:
    (mean, cov), (mean_2, cov_2) = a, b
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # (C C')^(1/2) has the trace of (C^(1/2) C' C^(1/2))^(1/2), which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return float(np.sum((mean - mean_2) ** 2) + np.trace(cov) + np.trace(cov_2) - 2 * cross)


def modes(points: np.ndarray) -> tuple[int, float]:
    """How many centers have 2 % of the points within 4 sigma; the share of points that are."""
    distance = np.linalg.norm(points[:, None] - centers()[None], axis=-1)
    near = distance < 4 * SPREAD
    return int((near.mean(0) >= 0.02).sum()), float(near.any(1).mean())


def draw(samples: np.ndarray, path: Path) -> None:
    """A PNG: images as a grid, points as points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples.ndim == 4:
        side = int(len(samples) ** 0.5)
        grid = samples[: side * side].reshape(side, side, 28, 28)
        grid = grid.transpose(0, 2, 1, 3).reshape(side * 28, side * 28)
        mpl_image.imsave(path, grid, cmap="gray", vmin=-1, vmax=1)
        return
    figure, axes = plt.subplots(figsize=(3, 3), layout="constrained")
    axes.plot(*centers().T, "k+")
    axes.plot(*samples.T, ".", markersize=2, alpha=0.5)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    figure.savefig(path, dpi=80)
    plt.close(figure)
