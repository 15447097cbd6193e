"""Gradient clipping in float64 NumPy; see keras_ext/optimizers/clipping.py for the formulas."""

import numpy as np


def norm(*tensors):
    return np.sqrt(sum((t**2).sum() for t in tensors))


def hard(grads, threshold, scope="global"):
    return _clip(grads, scope, lambda n: min(1.0, threshold / n) if n else 1.0)


def smooth(grads, threshold, scope="global"):
    return _clip(grads, scope, lambda n: threshold / (n + threshold))


def _clip(grads, scope, factor):
    if scope == "variable":
        return [g * factor(norm(g)) for g in grads]
    return [g * factor(norm(*grads)) for g in grads]


def adaptive(grads, weights, threshold, axes, epsilon=1e-3):
    """`axes` holds for each weight the axes that one unit extends over."""
    clipped = []
    for g, w, axis in zip(grads, weights, axes, strict=True):
        length, limit = (np.sqrt((t**2).sum(axis, keepdims=True)) for t in (g, w))
        limit = threshold * np.maximum(limit, epsilon)
        with np.errstate(divide="ignore"):
            clipped.append(g * np.minimum(1.0, limit / length))
    return clipped


def before(update, clip):
    """The optimizer `update` with gradients that `clip(grads, weights)` clips first."""

    def clipped_update(weights, grads, state, t):
        return update(weights, clip(grads, weights), state, t)

    return clipped_update
