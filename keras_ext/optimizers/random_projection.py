"""LoRA's step in a basis that is drawn afresh at every update.

    dW = (dA B + A dB) / 2,    gradients of the steps: G B', A' G        G = dLoss/dW

with fresh A (n, r), B (r, m), entries N(0, 1/r), so E[B'B] = 1 and E[A A'] = 1: under SGD the
projection is right on average, E[dW] = -lr G (the article's update is twice that).

Cost: with Adam 2 r (n + m) moments and r (n + m) steps in place of 2 n m moments, and 4 n m r
multiplications per update.

Source: kexue.fm/archives/9590.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext.optimizers.low_rank import LowRankOptimizer, Projection
from keras_ext.optimizers.selection import Selectable


class FreshBasis(Projection):
    def build(self, n: int, m: int) -> None:
        self.coordinates = (
            self.add((n, self.rank), "step_A"),
            self.add((self.rank, m), "step_B"),
        )

    def basis(self, grad: Any) -> list:
        self.restart()

        def draw(like: keras.Variable) -> Any:
            return keras.random.normal(
                like.shape,
                stddev=self.rank**-0.5,
                dtype=self.dtype,
                seed=self.owner.seed_generator,
            )

        return [draw(coordinate) for coordinate in self.coordinates]

    def gradients(self, basis: list, grad: Any) -> list:
        a, b = basis
        return [ops.matmul(grad, ops.transpose(b)), ops.matmul(ops.transpose(a), grad)]

    def step(self, basis: list) -> Any:
        (a, b), (step_a, step_b) = basis, [v.value for v in self.coordinates]
        return (ops.matmul(step_a, b) + ops.matmul(a, step_b)) / 2


@keras.saving.register_keras_serializable(package="keras_ext")
class RandomProjectionOptimizer(LowRankOptimizer):
    """Train matrices by steps in a random basis: dW = (dA B + A dB) / 2 with fresh A, B.

    The inner optimizer makes steps of A and B in place of those of the chosen matrices, and
    trains all other variables as ever. Clipping inside sees the gradients of A and B.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1.
        include: which variables: regular expressions searched in `variable.path`, layers,
            variables, or a list of these; default, all with both sides above `rank`. Of these,
            matrices are taken.
        seed: integer for all draws; default, random.
        name: name of the wrapper.

    Meant for plain SGD: the basis changes at every update, so momentum averages over old bases.
    Steps start from zero, so weight decay acts on W itself, and inner rules that look at the
    weights see zero: `Lamb` is Adam, `Adafactor` takes its smallest step. `AccumOptimizer`
    goes outside.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights or accumulates.

    Example:
        >>> optimizer = RandomProjectionOptimizer("sgd", rank=1, include="kernel", seed=0)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)

    Reference: kexue.fm/archives/9590.
    """

    projection = FreshBasis

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int,
        include: Selectable | Sequence[Selectable] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, rank, include, name)
        self.seed = seed

    def build(self, variables: list) -> None:
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        super().build(variables)

    @property
    def own_variables(self) -> list:
        return super().own_variables + ([self.seed_generator.state] if self.built else [])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"seed": self.seed}
