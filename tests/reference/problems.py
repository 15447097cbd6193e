"""Small regression problems with their gradients in float64 NumPy."""

import numpy as np

VOCABULARY, LENGTH, WIDTH, OUTPUTS = 6, 5, 4, 3


class Regression:
    """p = h W + b with h = x, or h = the mean of the embeddings of x; loss = mean (p - y)^2."""

    def __init__(self, embedding: bool, rows: int = 48, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.embedding = embedding
        if embedding:  # far more tokens than the vocabulary has: every one is repeated
            self.x = rng.integers(0, VOCABULARY, (rows, LENGTH)).astype("int32")
        else:
            self.x = rng.normal(size=(rows, WIDTH)).astype("float32")
        self.y = rng.normal(size=(rows, OUTPUTS)).astype("float32")
        self.weights = [rng.normal(size=(WIDTH, OUTPUTS)), rng.normal(size=OUTPUTS)]
        if embedding:
            self.weights.insert(0, rng.normal(size=(VOCABULARY, WIDTH)))
        # Start from values that float32 holds exactly.
        self.weights = [w.astype("float32").astype("float64") for w in self.weights]

    def gradients(self, weights, rows=slice(None), row_weights=None):
        """Gradients of the (weighted) mean over the rows."""
        x, y = self.x[rows], self.y[rows].astype("float64")
        *table, kernel, bias = weights
        h = table[0][x].mean(1) if self.embedding else x.astype("float64")
        share = np.full(len(y), 1.0) if row_weights is None else np.asarray(row_weights, float)
        share = share / share.sum()
        dp = 2 * (h @ kernel + bias - y) / OUTPUTS * share[:, None]
        grads = [h.T @ dp, dp.sum(0)]
        if self.embedding:
            dtable = np.zeros_like(table[0])
            np.add.at(dtable, x, (dp @ kernel.T / LENGTH)[:, None, :])
            grads.insert(0, dtable)
        return grads

    def train(self, update, batches, transform=lambda grads: grads):
        """Weights after one update per batch (a slice of rows each)."""
        weights, state = self.weights, [{} for _ in self.weights]
        for t, rows in enumerate(batches, start=1):
            weights = update(weights, transform(self.gradients(weights, rows)), state, t)
        return weights
