"""A matrix seen through few numbers: the four parametrisations of `LowRankOptimizer`.

Each class stands for one weight matrix W (n, m) with gradient G and gives the inner
optimizer small variables, the `coordinates`, in its place. An update asks in this order

    basis      what the update starts from, as plain tensors
    gradients  one per coordinate
    step       the change of W, once the inner optimizer has moved the coordinates

Where `keeps_factors` is true the coordinates are the factors themselves and W - W0 is a
function of them; otherwise they start every update from zero and hold one step.
"""

import keras
from keras import ops

from keras_ext import backend


class Projection:
    """Base: creates variables through `owner`, the LowRankOptimizer."""

    keeps_factors = False

    def __init__(self, owner, variable, seed: int | None = None):
        self.owner = owner
        self.variable = variable
        self.seed = seed
        self.rank = owner.rank
        self.dtype = "float64" if variable.dtype == "float64" else "float32"
        self.check()
        self.build(*variable.shape)

    def check(self):
        variable, mode = self.variable, self.owner.mode
        if min(variable.shape) < self.rank:
            raise ValueError(
                f"target={self.owner.target!r} chooses {variable.path}, whose shape "
                f"{variable.shape} is too small for rank={self.rank}. Lower the rank, or let "
                "target leave it out."
            )
        if self.keeps_factors and variable.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"mode={mode!r} needs float32 weights, got {variable.dtype} for "
                f"{variable.path}: small steps would be lost in rounding. Use the dtype policy "
                '"mixed_bfloat16" or "mixed_float16".'
            )
        if self.keeps_factors and variable.constraint is not None:
            raise ValueError(
                f"{variable.path} has a constraint, which would break the low-rank form of "
                f"mode={mode!r}. Remove it, or leave the variable out by target."
            )

    def build(self, n: int, m: int):
        """Set `coordinates`, and `factors` if there is something to export."""
        raise NotImplementedError

    def add(self, shape, name, initializer="zeros"):
        name = f"{self.variable.path.replace('/', '_')}_{name}"
        return self.owner.add_variable(shape, initializer, dtype=self.dtype, name=name)

    def restart(self):
        for coordinate in self.coordinates:
            coordinate.assign(ops.zeros(coordinate.shape, coordinate.dtype))


class LoRA(Projection):
    """W = W0 + s A B, A (n, r), B (r, m): the gradients are s G B' and s A' G."""

    keeps_factors = True

    def build(self, n, m):
        self.scale = 1.0 if self.owner.alpha is None else self.owner.alpha / self.rank
        init = keras.initializers.HeUniform(seed=self.seed)  # as Keras starts its LoRA layers
        self.factors = self.coordinates = (
            self.add((n, self.rank), "A", init),
            self.add((self.rank, m), "B"),
        )

    def basis(self, grad=None):
        return backend.copies(self.coordinates)

    def gradients(self, basis, grad):
        a, b = basis
        return [
            self.scale * ops.matmul(grad, ops.transpose(b)),
            self.scale * ops.matmul(ops.transpose(a), grad),
        ]

    def step(self, basis):
        (a, b), (new_a, new_b) = basis, [v.value for v in self.coordinates]
        # A+ B+ - A B, without taking the difference of two large numbers.
        return self.scale * (ops.matmul(new_a - a, new_b) + ops.matmul(a, new_b - b))


class Additive(Projection):
    """W_ij = W0_ij + A_i(j mod r) + B_(i mod r)j, A (n, r), B (r, m), both from zero."""

    keeps_factors = True

    def build(self, n, m):
        if n % self.rank or m % self.rank:
            raise ValueError(
                f'mode="additive" needs a rank that divides both sides of every matrix, got '
                f"rank={self.rank} for {self.variable.path} of shape {(n, m)}. Choose another "
                "rank, or the matrices by target."
            )
        self.blocks = (n // self.rank, m // self.rank)
        self.factors = self.coordinates = (
            self.add((n, self.rank), "A"),
            self.add((self.rank, m), "B"),
        )

    def basis(self, grad=None):
        return backend.copies(self.coordinates)

    def gradients(self, basis, grad):
        (n, m), (rows, columns) = self.variable.shape, self.blocks
        return [
            ops.sum(ops.reshape(grad, (n, columns, self.rank)), axis=1),
            ops.sum(ops.reshape(grad, (rows, self.rank, m)), axis=0),
        ]

    def step(self, basis):
        rows, columns = self.blocks
        a, b = (new.value - old for new, old in zip(self.coordinates, basis, strict=True))
        return ops.tile(a, (1, columns)) + ops.tile(b, (rows, 1))


class RandomProjection(Projection):
    """dW = (dA B + A dB) / 2 with fresh A and B, entries N(0, 1/r): E[B'B] = 1 = E[A A']."""

    factors = None

    def build(self, n, m):
        self.coordinates = (
            self.add((n, self.rank), "step_A"),
            self.add((self.rank, m), "step_B"),
        )

    def basis(self, grad):
        self.restart()

        def draw(like):
            return keras.random.normal(
                like.shape,
                stddev=self.rank**-0.5,
                dtype=self.dtype,
                seed=self.owner.seed_generator,
            )

        return [draw(coordinate) for coordinate in self.coordinates]

    def gradients(self, basis, grad):
        a, b = basis
        return [ops.matmul(grad, ops.transpose(b)), ops.matmul(ops.transpose(a), grad)]

    def step(self, basis):
        (a, b), (step_a, step_b) = basis, [v.value for v in self.coordinates]
        return (ops.matmul(step_a, b) + ops.matmul(a, step_b)) / 2


class GaLore(Projection):
    """R = G V or U' G with the first r singular vectors of the shorter side of G."""

    def build(self, n, m):
        # GaLore projects the inputs of a square Linear; the inputs are the rows of a kernel.
        self.right = n > m
        self.factors = (self.add((min(n, m), self.rank), "projector"),)
        shape = (n, self.rank) if self.right else (self.rank, m)
        self.coordinates = (self.add(shape, "step"),)

    def basis(self, grad):
        self.restart()
        (projector,) = self.factors
        # A matrix without a gradient at the last refresh has an empty projector still.
        due = ops.logical_or(
            ops.equal(self.owner.iterations % self.owner.update_gap, 0),
            ops.logical_not(ops.any(ops.not_equal(projector, 0))),
        )

        def refresh():
            projector.assign(self.singular_vectors(grad, projector))

        backend.run_if(due, refresh, variables=[projector])
        return backend.copies([projector])

    def singular_vectors(self, grad, before):
        grad = ops.where(ops.isfinite(grad), grad, 0)  # torch refuses NaN, and NaN would stay
        u, _, vt = ops.svd(grad, full_matrices=False)
        vectors = (ops.transpose(vt) if self.right else u)[:, : self.rank]
        # The sign of a singular vector is free. Keep the one that fits the moments inside.
        flip = ops.sum(vectors * before, axis=0) < 0
        return ops.where(flip, -vectors, vectors)

    def gradients(self, basis, grad):
        (p,) = basis
        return [ops.matmul(grad, p) if self.right else ops.matmul(ops.transpose(p), grad)]

    def step(self, basis):
        (p,), step = basis, self.owner.scale * self.coordinates[0].value
        return ops.matmul(step, ops.transpose(p)) if self.right else ops.matmul(p, step)


PROJECTIONS = {
    "lora": LoRA,
    "galore": GaLore,
    "random": RandomProjection,
    "additive": Additive,
}
