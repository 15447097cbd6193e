"""Margin softmax in float64 NumPy, with the angles themselves, from acos."""

import numpy as np


def cosines(features, kernel):
    lengths = np.linalg.norm(features, axis=-1, keepdims=True) * np.linalg.norm(kernel, axis=0)
    return features @ kernel / lengths


def loss(labels, cosines, psi, scale):
    """log(1 + Σ_{i≠t} exp(s c_i - s ψ(θ_t))) of each row."""
    losses = []
    for label, row in zip(labels, np.asarray(cosines, float), strict=True):
        target = psi(np.arccos(np.clip(row[label], -1, 1)))
        differences = scale * (np.delete(row, label) - target)
        losses.append(np.logaddexp.reduce(np.append(differences, -np.inf)))
    return np.logaddexp(0, losses)


def am(theta, m=0.35):
    return np.cos(theta) - m


def arc(theta, m=0.5):
    return np.where(theta + m <= np.pi, np.cos(theta + m), np.cos(theta) - m * np.sin(m))


def arc_easy(theta, m=0.5):
    return np.where(theta < np.pi / 2, np.cos(theta + m), np.cos(theta))


def a(theta, m=4, annealing=0.0):
    return (annealing * np.cos(theta) + combined(theta, m, 0, 0)) / (1 + annealing)


def simple_a(theta):
    return np.minimum(np.cos(4 * theta), np.cos(theta))


def combined(theta, m1=1.0, m2=0.3, m3=0.2):
    angle = m1 * theta + m2
    k = np.floor(angle / np.pi)
    return (-1) ** k * np.cos(angle) - 2 * k - m3
