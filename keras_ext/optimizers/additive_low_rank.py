"""The cheapest low-rank form: W = W0 + tile A + tile B, whose gradients are sums over blocks.

    W_ij = W0_ij + A_i(j mod r) + B_(i mod r)j        A (n, r), B (r, m), both from zero

With r = 1 the gradients are the sums of the rows and of the columns of G = dLoss/dW: no
multiplication at all. Exact: it is a layer with these weights. Cost: with Adam r (n + m)
factors and 2 r (n + m) moments in place of 2 n m moments.

Source: kexue.fm/archives/9590.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.low_rank import LowRankOptimizer, Projection


class AdditiveFactors(Projection):
    def build(self, n: int, m: int) -> None:
        if n % self.rank or m % self.rank:
            raise ValueError(
                "AdditiveLowRankOptimizer needs a rank that divides both sides of every "
                f"matrix, got rank={self.rank} for {self.variable.path} of shape {(n, m)}. "
                "Choose another rank, or the matrices by include."
            )
        self.blocks = (n // self.rank, m // self.rank)
        self.factors = self.coordinates = (
            self.add((n, self.rank), "A"),
            self.add((self.rank, m), "B"),
        )

    def basis(self, grad: Any) -> list:
        return backend.snapshot(self.coordinates)

    def gradients(self, basis: list, grad: Any) -> list:
        (n, m), (rows, columns) = self.variable.shape, self.blocks
        return [
            ops.sum(ops.reshape(grad, (n, columns, self.rank)), axis=1),
            ops.sum(ops.reshape(grad, (rows, self.rank, m)), axis=0),
        ]

    def step(self, basis: list) -> Any:
        rows, columns = self.blocks
        a, b = (new.value - old for new, old in zip(self.coordinates, basis, strict=True))
        return ops.tile(a, (1, columns)) + ops.tile(b, (rows, 1))


@keras.saving.register_keras_serializable(package="keras_ext")
class AdditiveLowRankOptimizer(LowRankOptimizer):
    """Train matrices through r columns and r rows that are added: W = W0 + tile A + tile B.

    The inner optimizer trains A and B in place of the chosen matrices, and all other variables
    as ever. Clipping inside sees the gradients of A and B.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1, which divides both sides of every chosen matrix.
        include: which variables: regular expressions searched in `variable.path`, layers,
            variables, or a list of these; default, all with both sides above `rank`. Of these,
            matrices are taken.
        name: name of the wrapper.

    `factors(variable)` returns (A, B). Weight decay acts on A and B, never on W0.
    Half-precision weights are refused, as in `LoRAOptimizer`. `AccumOptimizer` may stand
    inside, where it sums small gradients, or outside.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights.

    Example:
        >>> optimizer = AdditiveLowRankOptimizer("adam", rank=1, include="kernel")
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)

    Reference: kexue.fm/archives/9590.
    """

    projection = AdditiveFactors
    keeps_factors = True
