"""One update of each optimizer in float64 NumPy, written from the formulas.

`update(weights, grads, state, t)` returns the new weights; `t` counts updates from 1 and
`state` is a list of one dictionary per weight that the function keeps its moments in.
"""

import numpy as np


def clip_global(grads, norm):
    total = np.sqrt(sum((g**2).sum() for g in grads))
    return [g * norm / max(total, norm) for g in grads]


def sgd(lr, momentum=0.0):
    def step(w, g, s, t):
        s["m"] = momentum * s.get("m", 0.0) - lr * g
        return w + s["m"]

    return _each(step)


def adam(lr, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0):
    def step(w, g, s, t):
        w = w - weight_decay * lr * w
        s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * g
        s["v"] = beta_2 * s.get("v", 0.0) + (1 - beta_2) * g**2
        rate = lr * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        return w - rate * s["m"] / (np.sqrt(s["v"]) + epsilon)

    return _each(step)


def lion(lr, beta_1=0.9, beta_2=0.99):
    def step(w, g, s, t):
        m = s.get("m", 0.0)
        s["m"] = beta_2 * m + (1 - beta_2) * g
        return w - lr * np.sign(beta_1 * m + (1 - beta_1) * g)

    return _each(step)


def rmsprop(lr, rho=0.9, epsilon=1e-7):
    def step(w, g, s, t):
        s["v"] = rho * s.get("v", 0.0) + (1 - rho) * g**2
        return w - lr * g / np.sqrt(s["v"] + epsilon)

    return _each(step)


def adafactor(lr, beta_2_decay=-0.8, epsilon_1=1e-30, epsilon_2=1e-3, clip=1.0):
    def rms(x):
        return np.sqrt(np.mean(x**2))

    def step(w, g, s, t):
        alpha = max(epsilon_2, rms(w)) * min(lr, 1 / np.sqrt(t))
        beta = 1 - t**beta_2_decay
        square = g**2 + epsilon_1
        if g.ndim >= 2:
            s["r"] = beta * s.get("r", 0.0) + (1 - beta) * square.mean(-1)
            s["c"] = beta * s.get("c", 0.0) + (1 - beta) * square.mean(-2)
            v = (s["r"] / s["r"].mean(-1, keepdims=True))[..., None] * s["c"][..., None, :]
        else:
            v = s["v"] = beta * s.get("v", 0.0) + (1 - beta) * square
        u = g / np.sqrt(v)
        return w - alpha * u / max(1.0, rms(u) / clip)

    return _each(step)


def lamb(lr, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    def step(w, g, s, t):
        s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * g
        s["v"] = beta_2 * s.get("v", 0.0) + (1 - beta_2) * g**2
        u = s["m"] / (1 - beta_1**t) / (np.sqrt(s["v"] / (1 - beta_2**t)) + epsilon)
        w_norm, u_norm = np.linalg.norm(w), np.linalg.norm(u)
        ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        return w - lr * ratio * u

    return _each(step)


def _each(step):
    def update(weights, grads, state, t):
        return [step(w, g, s, t) for w, g, s in zip(weights, grads, state, strict=True)]

    return update
