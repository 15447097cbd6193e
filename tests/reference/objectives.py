"""A small network and its training objectives, by hand in float64.

    h = E[x] + out, flat    c = h - mean over the batch    a = tanh((c mask) K1 + b1)
    p = softmax(a K2 + b2)

The gradients to E and to `out` are written out. Those to all weights are central differences,
with the shifts r held fixed where the objective holds them.
"""

import numpy as np

TOKENS, SIZE, LENGTH, HIDDEN, CLASSES = 5, 2, 3, 2, 3
L2 = 0.05  # on K1


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def unit(g):
    return g / np.sqrt((g**2).sum())


class Network:
    """At weights (E, K1, b1, K2, b2), on a batch, with dropout masks: one for each pass."""

    def __init__(self, weights, x, y, masks):
        self.weights = [np.asarray(w, "float64") for w in weights]
        self.x, self.y, self.masks = x, y, [np.asarray(m, "float64") for m in masks]

    def at(self, weights):
        return Network(weights, self.x, self.y, self.masks)

    def forward(self, number=0, matrix=0.0, out=0.0):
        embeddings, k1, b1, k2, b2 = self.weights
        h = ((embeddings + matrix)[self.x] + out).reshape(len(self.x), -1)
        a = np.tanh(((h - h.mean(0)) * self.masks[number]) @ k1 + b1)
        return a, softmax(a @ k2 + b2)

    def predict(self, number=0, **shift):
        return self.forward(number, **shift)[1]

    def back(self, dz, number, on, **shift):
        """From the gradient to the logits to that of the target."""
        _, k1, _, k2, _ = self.weights
        a, _ = self.forward(number, **shift)
        d = ((dz @ k2.T) * (1 - a**2)) @ k1.T * self.masks[number]
        d = (d - d.mean(0)).reshape(len(self.x), LENGTH, SIZE)
        if on == "out":
            return d
        gradient = np.zeros((TOKENS, SIZE))
        np.add.at(gradient, self.x, d)
        return gradient

    @property
    def onehot(self):
        return np.eye(CLASSES)[self.y]

    # Losses: functions of a shift, and their gradients to the target.

    def entropy(self, number=0, **shift):
        p = self.predict(number, **shift)
        return -np.log(p[np.arange(len(self.y)), self.y]).mean()

    def slope(self, on, number=0, **shift):
        p = self.predict(number, **shift)
        return self.back((p - self.onehot) / len(p), number, on, **shift)

    def r_drop(self, alpha, **shift):
        p, q = (self.predict(i, **shift) for i in (0, 1))
        both = (divergence(p, q) + divergence(q, p)) / 4
        return (self.entropy(0, **shift) + self.entropy(1, **shift)) / 2 + alpha * both

    def r_drop_slope(self, alpha, on, **shift):
        p, q = (self.predict(i, **shift) for i in (0, 1))
        gradient = 0
        for number, (a, b) in enumerate(((p, q), (q, p))):
            # KL(a || b) and KL(b || a) to the logits of a
            ratio = np.log(a) - np.log(b)
            dz = a * (ratio - (a * ratio).sum(-1, keepdims=True)) + (a - b)
            dz = (a - self.onehot) / 2 + alpha / 4 * dz
            gradient = gradient + self.back(dz / len(a), number, on, **shift)
        return gradient

    def virtual_shift(self, on, u, epsilon, xi):
        p, u = self.predict(0), xi * unit(u)
        q = self.predict(0, **{on: u})
        return epsilon * unit(self.back((q - p) / len(p), 0, on, **{on: u}))


def divergence(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1).mean()


def regularised(loss):
    """With the weight regulariser, which counts once."""
    return lambda net: loss(net) + L2 * (net.weights[1] ** 2).sum()


def differences(loss, net, step=1e-5):
    """Central differences of loss(net) to all weights."""
    gradients = []
    for number, weight in enumerate(net.weights):
        gradient = np.zeros_like(weight)
        for place in np.ndindex(weight.shape):
            values = []
            for sign in (1, -1):
                weights = [w.copy() for w in net.weights]
                weights[number][place] += sign * step
                values.append(loss(net.at(weights)))
            gradient[place] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients
