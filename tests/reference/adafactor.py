"""Adafactor as in the paper and in bert4keras,, in float64 NumPy."""

import numpy as np


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def relative_adafactor(
    lr,
    beta_1=0.0,
    beta_2=None,
    epsilon_1=1e-30,
    epsilon_2=1e-3,
    clip=1.0,
    min_dim=128,
    scaled=lambda index: True,
    weight_decay=0.0,
):
    """`update(weights, grads, state, t)`; `lr` None is min(1 / sqrt(t), 1e-2)."""

    def step(index, w, g, s, t):
        rate = min(1 / np.sqrt(t), 1e-2) if lr is None else lr
        decay = 1 - t**-0.8 if beta_2 is None else beta_2
        w = w - weight_decay * rate * w
        square = g**2 + epsilon_1

        def average(name, value):
            s[name] = decay * s.get(name, 0.0) + (1 - decay) * value
            return s[name]

        *_, a, b = np.argsort(g.shape, kind="stable") if g.ndim >= 2 else (0, 0)
        if g.ndim >= 2 and g.shape[a] >= min_dim:
            along_a = average("a", square.mean(axis=b, keepdims=True))
            along_b = average("b", square.mean(axis=a, keepdims=True))
            v = along_a * along_b / along_a.mean(axis=a, keepdims=True)
        else:
            v = average("v", square)
        u = g / np.sqrt(v + epsilon_1)
        if clip is not None:
            u = u / max(1.0, rms(u) / clip)
        s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * u
        return w - rate * (max(epsilon_2, rms(w)) if scaled(index) else 1.0) * s["m"]

    def update(weights, grads, state, t):
        quadruples = zip(range(len(weights)), weights, grads, state, strict=True)
        return [step(i, w, g, s, t) for i, w, g, s in quadruples]

    return update
