"""GANs in float64 NumPy, forward only; gradients by central differences."""

import numpy as np


def softplus(x):
    return np.logaddexp(x, 0)


def qp_distance(x_real, x_fake, norm="l2"):
    """One distance per pair."""
    difference = (x_real - x_fake).reshape(len(x_real), -1)
    if norm == "l1":
        return np.abs(difference).mean(1)
    return np.sqrt((difference**2).mean(1))


def gan_qp(r, f, x_real, x_fake, scale=10.0, norm="l2", epsilon=1e-6):
    distance = (qp_distance(x_real, x_fake, norm) + epsilon).reshape(r.shape)
    return np.mean(f - r + (r - f) ** 2 / (2 * scale * distance))


# name -> (discriminator(r, f, x_real, x_fake), generator(r, f))
LOSSES = {
    "hinge": (
        lambda r, f, *x: np.maximum(1 - r, 0).mean() + np.maximum(1 + f, 0).mean(),
        lambda r, f: -f.mean(),
    ),
    "non_saturating": (
        lambda r, f, *x: softplus(-r).mean() + softplus(f).mean(),
        lambda r, f: softplus(-f).mean(),
    ),
    "wgan": (lambda r, f, *x: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (
        lambda r, f, *x: softplus(f - r).mean(),
        lambda r, f: softplus(r - f).mean(),
    ),
    "relativistic_average": (
        lambda r, f, *x: softplus(f.mean() - r).mean() + softplus(f - r.mean()).mean(),
        lambda r, f: softplus(r.mean() - f).mean() + softplus(r - f.mean()).mean(),
    ),
    "gan_qp": (gan_qp, lambda r, f: r.mean() - f.mean()),
    "gan_qp_l1": (lambda *a: gan_qp(*a, norm="l1"), lambda r, f: r.mean() - f.mean()),
}


def batch_norm(x, gamma, beta, epsilon=1e-3):
    return gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + epsilon) + beta


def leaky_relu(x, slope=0.2):
    return np.where(x > 0, x, slope * x)


def network(x, weights):
    """Dense, batch normalisation if there are six weights, leaky ReLU, Dense."""
    kernel, bias, *norm, kernel_2, bias_2 = weights
    h = x @ kernel + bias
    if norm:
        h = batch_norm(h, *norm)
    return leaky_relu(h) @ kernel_2 + bias_2


def slopes(x, weights, slope=0.2):
    """||dD/dx|| per example of a `network` without normalisation: (batch, 1)."""
    kernel, bias, kernel_2, _ = weights
    steepness = np.where(x @ kernel + bias > 0, 1, slope) * kernel_2[:, 0]
    return np.linalg.norm(steepness @ kernel.T, axis=1, keepdims=True)


def gradients(loss, weights, step=1e-6):
    """Central differences of `loss(weights)`, one array per weight."""
    result = []
    for i, weight in enumerate(weights):
        gradient = np.zeros(weight.shape)
        for index in np.ndindex(weight.shape):
            values = []
            for sign in (1, -1):
                moved = weight.copy()
                moved[index] += sign * step
                values.append(loss([*weights[:i], moved, *weights[i + 1 :]]))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        result.append(gradient)
    return result
