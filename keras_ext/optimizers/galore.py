"""GaLore: moments of the gradient in the space of its first singular vectors.

    R = G V or U' G,    dW = scale * dR V' or scale * U dR        G = dLoss/dW (n, m)

with the first r singular vectors of the shorter side of G, taken every `update_gap` updates,
as GaLore does. At full rank under SGD it is SGD.

Cost, with n >= m: steps, moments and projector, r (3 n + m) numbers in place of 2 n m moments,
2 n m r multiplications to R and as many back, and the SVD every `update_gap` updates.

Source: kexue.fm/archives/9590; Zhao et al. 2024, arXiv 2403.03507.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext import arguments, backend
from keras_ext.optimizers.low_rank import LowRankOptimizer, Projection
from keras_ext.optimizers.selection import Selectable


class SingularVectors(Projection):
    def build(self, n: int, m: int) -> None:
        # GaLore projects the inputs of a square Linear; the inputs are the rows of a kernel.
        self.right = n > m
        self.factors = (self.add((min(n, m), self.rank), "projector"),)
        shape = (n, self.rank) if self.right else (self.rank, m)
        self.coordinates = (self.add(shape, "step"),)

    def basis(self, grad: Any) -> list:
        self.restart()
        (projector,) = self.factors or ()
        # A matrix without a gradient at the last refresh has an empty projector still.
        due = ops.logical_or(
            ops.equal(self.owner.iterations % self.owner.update_gap, 0),
            ops.logical_not(ops.any(ops.not_equal(projector, 0))),
        )

        def refresh() -> None:
            vectors = self.singular_vectors(grad, projector)
            given = ops.any(ops.not_equal(grad, 0))  # zeros have no directions
            projector.assign(ops.where(given, vectors, projector.value))

        self.owner.when(due, refresh)
        return backend.snapshot([projector])

    def singular_vectors(self, grad: Any, before: Any) -> Any:
        grad = ops.where(ops.isfinite(grad), grad, 0)  # torch refuses NaN, and NaN would stay
        u, _, vt = ops.svd(grad, full_matrices=False)
        vectors = (ops.transpose(vt) if self.right else u)[:, : self.rank]
        # The sign of a singular vector is free. Keep the one that fits the moments inside.
        flip = ops.sum(vectors * before, axis=0) < 0
        return ops.where(flip, -vectors, vectors)

    def gradients(self, basis: list, grad: Any) -> list:
        (p,) = basis
        return [ops.matmul(grad, p) if self.right else ops.matmul(ops.transpose(p), grad)]

    def step(self, basis: list) -> Any:
        (p,), step = basis, self.owner.scale * self.coordinates[0].value
        return ops.matmul(step, ops.transpose(p)) if self.right else ops.matmul(p, step)


@keras.saving.register_keras_serializable(package="keras_ext")
class GaLoreOptimizer(LowRankOptimizer):
    """Train matrices in the space of the first singular vectors of their gradients.

        dW = scale * dR P',      P from the SVD of the gradient

    The inner optimizer makes steps of R in place of those of the chosen matrices, and trains
    all other variables as ever. Clipping inside sees the gradients of R.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1.
        update_gap: updates from one SVD to the next; default 200. On a CPU use TensorFlow
            without XLA, whose SVD takes 20 seconds for 256 x 256 there.
        scale: factor > 0 of the steps; default 1 (GaLore's README has 0.25).
        include: which variables: regular expressions searched in `variable.path`, layers,
            variables, or a list of these; default, all with both sides above `rank`. Of these,
            matrices are taken.
        name: name of the wrapper.

    `factors(variable)` returns the projector, (P,). Steps start from zero, so weight decay acts
    on W itself, as in GaLore. Inner rules that look at the weights see zero: `Lamb` is Adam,
    `Adafactor` takes its smallest step. Moments are carried from one basis into the next as
    they are (so in GaLore). `AccumOptimizer` goes outside.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights or accumulates.

    Example:
        >>> optimizer = GaLoreOptimizer("adam", rank=1, include="kernel", update_gap=50)
        >>> model.compile(optimizer, loss="mse", jit_compile=False)
        >>> history = model.fit(x, y, verbose=0)

    Reference: kexue.fm/archives/9590; Zhao et al. 2024, arXiv 2403.03507.
    """

    projection = SingularVectors

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int,
        update_gap: int = 200,
        scale: float = 1.0,
        include: Selectable | Sequence[Selectable] | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, rank, include, name)
        self.update_gap = arguments.integer("update_gap", update_gap)
        self.scale = arguments.number("scale", scale, "(0, inf)")

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"update_gap": self.update_gap, "scale": self.scale}
