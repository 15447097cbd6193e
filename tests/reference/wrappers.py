"""Optimizer wrappers as float64 NumPy objects that nest as ours do.

Each has `step(weights, grads) -> weights` and counts real updates in `iterations`.
"""

from reference import optimizers


class Leaf:
    """An optimizer of `reference.optimizers`."""

    def __init__(self, update):
        self.update, self.state, self.iterations = update, None, 0

    def step(self, weights, grads):
        self.state = self.state or [{} for _ in weights]
        self.iterations += 1
        return self.update(weights, grads, self.state, self.iterations)


class Wrapper:
    """Passes everything on, as a loss scale does: it cancels."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def iterations(self):
        return self.inner.iterations

    def step(self, weights, grads):
        return self.inner.step(weights, grads)


class Accum(Wrapper):
    def __init__(self, inner, steps):
        super().__init__(inner)
        self.steps, self.pending = steps, []

    def step(self, weights, grads):
        self.pending.append(grads)
        if len(self.pending) < self.steps:
            return weights
        means = [sum(g) / self.steps for g in zip(*self.pending, strict=True)]
        self.pending = []
        return super().step(weights, means)


class Clip(Wrapper):
    def __init__(self, inner, threshold):
        super().__init__(inner)
        self.threshold = threshold

    def step(self, weights, grads):
        return super().step(weights, optimizers.clip_global(grads, self.threshold))


class Multiplier(Wrapper):
    def __init__(self, inner, multipliers):
        super().__init__(inner)
        self.multipliers = multipliers

    def step(self, weights, grads):
        triples = zip(weights, super().step(weights, grads), self.multipliers, strict=True)
        return [w + m * (new - w) for w, new, m in triples]


class Lookahead(Wrapper):
    def __init__(self, inner, period, size):
        super().__init__(inner)
        self.period, self.size, self.slow = period, size, None

    def step(self, weights, grads):
        self.slow = self.slow or weights
        before = self.iterations
        weights = super().step(weights, grads)
        if self.iterations == before or self.iterations % self.period:
            return weights
        pairs = zip(self.slow, weights, strict=True)
        self.slow = [q + self.size * (p - q) for q, p in pairs]
        return self.slow
