"""Optimizers that accumulate in their moments, micro-batch by micro-batch, in float64 NumPy.

`update(weights, grads, state, t)` as in `optimizers`, but `t` counts micro-batches of the
hidden forms, written as kexue.fm/archives/8634 has them: a moment decays before a cycle.
"""

import numpy as np


def hidden_adam(lr, k, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0):
    def step(w, m, v, u):
        rate = lr(u) if callable(lr) else lr
        w = w - weight_decay * rate * w
        m_hat, v_hat = m / (1 - beta_1**u), v / (1 - beta_2**u)
        # Keras adds epsilon to the square root of v itself.
        return w - rate * m_hat / (np.sqrt(v_hat) + epsilon / np.sqrt(1 - beta_2**u))

    return _hidden(step, k, beta_1, beta_2)


def hidden_lamb(lr, k, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0):
    def step(w, m, v, u):
        w = w - weight_decay * lr * w
        m_hat, v_hat = m / (1 - beta_1**u), v / (1 - beta_2**u)
        update = m_hat / (np.sqrt(v_hat) + epsilon)
        return w - lr * np.linalg.norm(w) / np.linalg.norm(update) * update

    return _hidden(step, k, beta_1, beta_2)


def _hidden(step, k, beta_1, beta_2):
    def update(weights, grads, state, t):
        first, last = (t - 1) % k == 0, t % k == 0
        new = []
        for w, g, s in zip(weights, grads, state, strict=True):
            s["m"] = (beta_1 if first else 1) * s.get("m", 0.0) + (1 - beta_1) / k * g
            s["v"] = (beta_2 if first else 1) * s.get("v", 0.0) + (1 - beta_2) / k * g**2
            new.append(step(w, s["m"], s["v"], t // k) if last else w)
        return new

    return update


def tiger(lr, kinds, beta=0.965, weight_decay=0.01):
    """On large batches. `kinds`: "matrix", "rows" (of an embedding) or "vector" per weight."""

    def update(weights, grads, state, t):
        new = []
        for w, g, s, kind in zip(weights, grads, state, kinds, strict=True):
            s["m"] = beta * s.get("m", 0.0) + (1 - beta) * g
            if kind == "vector":
                new.append(w - 0.5 * lr * np.sign(s["m"]))
            else:
                axis = -1 if kind == "rows" else None
                rate = lr * np.sqrt(np.mean(w**2, axis=axis, keepdims=True))
                new.append(w - rate * (np.sign(s["m"]) + weight_decay * w))
        return new

    return update
