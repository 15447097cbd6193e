"""LoRA inside the optimizer: W = W0 + s A B, without touching the model.

    gradients  s G B', s A' G        with G = dLoss/dW, A (n, r), B (r, m), s = alpha / r

Exact: it is the LoRA layer (same A, B, same trajectory to rounding), since dLoss/dA = s G B'
whoever computes it. One step of SGD moves W by

    A+ B+ - A B = -lr (G B'B + A A' G) + lr^2 G B'A' G

so LoRA is gradient descent on a projected gradient. Cost: with Adam r (n + m) factors and
2 r (n + m) moments in place of 2 n m moments, and 4 n m r multiplications per update.

Source: kexue.fm/archives/9590; Hu et al. 2021, arXiv 2106.09685.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext import arguments, backend
from keras_ext.optimizers.low_rank import LowRankOptimizer, Projection
from keras_ext.optimizers.selection import Selectable


class LoRAFactors(Projection):
    def build(self, n: int, m: int) -> None:
        alpha = self.owner.alpha
        self.scale = 1.0 if alpha is None else alpha / self.rank
        init = keras.initializers.HeUniform(seed=self.seed)  # as Keras starts its LoRA layers
        self.factors = self.coordinates = (
            self.add((n, self.rank), "A", init),
            self.add((self.rank, m), "B"),
        )

    def basis(self, grad: Any) -> list:
        return backend.snapshot(self.coordinates)

    def gradients(self, basis: list, grad: Any) -> list:
        a, b = basis
        return [
            self.scale * ops.matmul(grad, ops.transpose(b)),
            self.scale * ops.matmul(ops.transpose(a), grad),
        ]

    def step(self, basis: list) -> Any:
        (a, b), (new_a, new_b) = basis, [v.value for v in self.coordinates]
        # A+ B+ - A B, without taking the difference of two large numbers.
        return self.scale * (ops.matmul(new_a - a, new_b) + ops.matmul(a, new_b - b))


@keras.saving.register_keras_serializable(package="keras_ext")
class LoRAOptimizer(LowRankOptimizer):
    """Train matrices as LoRA layers do: W = W0 + (alpha / r) A B.

    The inner optimizer trains A and B in place of the chosen matrices, and all other variables
    as ever. Clipping inside sees the gradients of A and B.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1.
        alpha: alpha > 0, as `lora_alpha` of Keras; default r, that is s = 1.
        include: which variables: regular expressions searched in `variable.path`, layers,
            variables, or a list of these; default, all with both sides above `rank`. Of these,
            matrices are taken: kernels of more axes (`EinsumDense`, convolutions) train as
            ever, and by default a bias (heads, size) of an attention may be a matrix, too.
        seed: integer for the first A; default, random.
        name: name of the wrapper.

    `factors(variable)` returns (A, B). Other values may be assigned before training as long as
    B = 0. Weight decay acts on A and B, never on W0. W is W0 + s A B to float32 rounding of
    every step (after 1,000 about 1e-6 of W). Half-precision weights would lose small steps and
    are refused: give them float32 (`mixed_bfloat16`), which is smaller than bfloat16 with a
    float32 copy. `AccumOptimizer` may stand inside, where it sums small gradients, or outside.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights.

    Example:
        >>> optimizer = LoRAOptimizer(keras.optimizers.AdamW(1e-3), rank=1, include="kernel")
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)
        >>> a, b = optimizer.factors(model.layers[-1].kernel)  # kernel = W0 + a b

    Reference: kexue.fm/archives/9590; Hu et al. 2021, arXiv 2106.09685.
    """

    projection = LoRAFactors
    keeps_factors = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int,
        alpha: float | None = None,
        include: Selectable | Sequence[Selectable] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, rank, include, name)
        self.alpha = None if alpha is None else arguments.number("alpha", alpha, "(0, inf)")
        self.seed = seed

    def _seed_of(self, index: int) -> int | None:
        return None if self.seed is None else self.seed + index

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"alpha": self.alpha, "seed": self.seed}
