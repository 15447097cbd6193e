"""Wrappers that act on the update, in float64 NumPy: each turns one `update` into another."""

import numpy as np


def multiply(update, factors):
    """w + m (w' - w), one m per variable."""

    def multiplied(weights, grads, state, t):
        new = update(weights, grads, state, t)
        return [w + m * (n - w) for w, n, m in zip(weights, new, factors, strict=True)]

    return multiplied


def lazy(update, tables=(0,)):
    """Of the variables in `tables`, rows with zero gradient stay."""

    def lazily(weights, grads, state, t):
        new = update(weights, grads, state, t)
        for i in tables:
            absent = ~grads[i].any(axis=1)
            new[i][absent] = weights[i][absent]
        return new

    return lazily


def layer_adaptive(update, rate, excluded=()):
    """w + lr ||w|| / ||w' - w|| (w' - w); `rate(t)` is lr, t = 1 for the first update."""

    def adapted(weights, grads, state, t):
        new = update(weights, grads, state, t)
        for i, w in enumerate(weights):
            step = new[i] - w
            norms = np.linalg.norm(w), np.linalg.norm(step)
            if i not in excluded and min(norms) > 0:
                new[i] = w + rate(t) * norms[0] / norms[1] * step
        return new

    return adapted
