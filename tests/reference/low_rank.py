"""Low-rank training in float64 NumPy: the parameters are factors, the weights follow."""

import numpy as np


class Lora:
    """W = W0 + s A B, parameters A and B."""

    def __init__(self, w0, a, scale=1.0):
        self.w0, self.scale = w0, scale
        self.start = [a, np.zeros((a.shape[1], w0.shape[1]))]

    def weight(self, a, b):
        return self.w0 + self.scale * a @ b

    def gradients(self, grad, a, b):
        return [self.scale * grad @ b.T, self.scale * a.T @ grad]


class Additive:
    """W_ij = W0_ij + A_i(j mod r) + B_(i mod r)j, element by element."""

    def __init__(self, w0, rank):
        self.w0, self.rank = w0, rank
        self.start = [np.zeros((w0.shape[0], rank)), np.zeros((rank, w0.shape[1]))]

    def weight(self, a, b):
        w = self.w0.copy()
        for i, j in np.ndindex(w.shape):
            w[i, j] += a[i, j % self.rank] + b[i % self.rank, j]
        return w

    def gradients(self, grad, a, b):
        da, db = np.zeros_like(a), np.zeros_like(b)
        for i, j in np.ndindex(grad.shape):
            da[i, j % self.rank] += grad[i, j]
            db[i % self.rank, j] += grad[i, j]
        return [da, db]


class Whole:
    """A variable that is trained as it is."""

    def __init__(self, w0):
        self.start = [w0]

    def weight(self, w):
        return w

    def gradients(self, grad, w):
        return [grad]


def train(problem, forms, update, batches):
    """Weights and parameters after one update per batch."""
    parameters = [p for form in forms for p in form.start]

    def split(values):
        values = iter(values)
        return [[next(values) for _ in form.start] for form in forms]

    state = [{} for _ in parameters]
    for t, rows in enumerate(batches, start=1):
        parts = split(parameters)
        weights = [form.weight(*p) for form, p in zip(forms, parts, strict=True)]
        grads = problem.gradients(weights, rows)
        small = []
        for form, grad, p in zip(forms, grads, parts, strict=True):
            small += form.gradients(grad, *p)
        parameters = update(parameters, small, state, t)
    parts = split(parameters)
    return [form.weight(*p) for form, p in zip(forms, parts, strict=True)], parts


def projector(grad, rank, before=None):
    """The first singular vectors of the shorter side; a kernel's inputs where it is square."""
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    vectors = (vt.T if len(grad) > len(grad.T) else u)[:, :rank]
    if before is not None:
        vectors = vectors * np.where((vectors * before).sum(0) < 0, -1.0, 1.0)
    return vectors


def train_galore(problem, update, batches, rank, gap, scale=1.0, decay=0.0):
    """GaLore for the matrices; `update` steps from zero, `decay` is lr * weight_decay."""
    weights = list(problem.weights)
    state = [{} for _ in weights]
    projectors = [None] * len(weights)
    for t, rows in enumerate(batches, start=1):
        grads = problem.gradients(weights, rows)
        for i, grad in enumerate(grads):
            right = len(grad) > len(grad.T)
            if grad.ndim == 2:
                if (t - 1) % gap == 0:
                    projectors[i] = projector(grad, rank, projectors[i])
                p = projectors[i]
                small = grad @ p if right else p.T @ grad
                step = update([np.zeros_like(small)], [small], [state[i]], t)[0]
                back = step @ p.T if right else p @ step
                weights[i] = (1 - decay) * weights[i] + scale * back
            else:
                weights[i] = update([(1 - decay) * weights[i]], [grad], [state[i]], t)[0]
    return weights
