"""Tiger: signs of a momentum, steps relative to the weights, gradient accumulation for nothing.

    m <- beta m + (1 - beta) g,    w <- w - r (sign(m) + weight_decay w)

The step needs m alone, so accumulation inside m (see hidden_accumulation.py) is exact, and m
and a counter are the whole state.

Source: kexue.fm/archives/9512, github.com/bojone/tiger.
"""

import re
from typing import Any

import keras
from keras import ops

from keras_ext import arguments, backend
from keras_ext.numerics import rms
from keras_ext.optimizers.hidden_accumulation import Moment, MomentumAccumulation


@keras.saving.register_keras_serializable(package="keras_ext")
class Tiger(MomentumAccumulation):
    """Tiger: signs of a momentum, with steps relative to the weights. Accumulates exactly.

        m <- beta m + (1 - beta) mean(g_i),    w <- w - r (sign(m) + weight_decay w)

    with r = rate RMS(w) for matrices, rate RMS(row) for the rows of embeddings, and rate / 2
    without decay for vectors (and what is called bias, beta, gamma or scale). The state is m
    and a counter, for any `accum_steps`. Note that a matrix of zeros stays zero.

    Where a micro-batch has an infinite or NaN gradient for a variable, that gradient is left
    out and the variable shrinks, w <- c + shrink (w - c), c = 1 for gamma and scale, else 0;
    if it is the last of a cycle, the variable is not updated.

    Args:
        learning_rate: a float, a schedule s(u) of the update u = 0, 1, ..., or a callable;
            default 1e-3.
        accum_steps: k >= 1, the number of micro-batches per update; default 1.
        beta: decay of m per update, in [0, 1); default 0.965 (text; for images 0.945).
        weight_decay: relative to the sign, which is 1; default 0.01.
        shrink: factor in (0, 1] for non-finite gradients; default 0.99.
        loss_scale_factor: constant that the loss is multiplied with; default none.
        name: name of the optimizer.

    Raises:
        ValueError: clipping, EMA or accumulation by Keras.

    Example:
        >>> optimizer = Tiger(1e-3, accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # updates as with 32

    Reference: kexue.fm/archives/9512, github.com/bojone/tiger.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        accum_steps: int = 1,
        beta: float = 0.965,
        weight_decay: float | None = 0.01,
        shrink: float = 0.99,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused: Any,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        self.beta = arguments.number("beta", beta, "[0, 1)")
        self.shrink = arguments.number("shrink", shrink, "(0, 1]")

    def moments(self) -> list[Moment]:
        return [Moment(self.momentums, self.beta, (1 - self.beta) / self.accum_steps)]

    def step(self, index: int, weight: Any, rate: Any, count: Any) -> Any:
        variable = self.model_variables[index]
        decay = self.weight_decay or 0.0
        if len(variable.shape) < 2 or re.search("bias|beta|gamma|scale", variable.name):
            rate, decay = rate / 2, 0.0
        elif "embeddings" in variable.name:
            rate = rate * rms(weight, axis=-1)
        else:
            rate = rate * rms(weight)
        if not self.decays(variable):
            decay = 0.0
        return weight - rate * (ops.sign(self.momentums[index].value) + decay * weight)

    def recover(self, index: int, weight: Any) -> Any:
        center = 1.0 if re.search("gamma|scale", self.model_variables[index].name) else 0.0
        return center + self.shrink * (weight - center)

    def update(self, grads: list) -> None:
        finite = [
            ops.convert_to_tensor(True)
            if g is None
            else ops.all(ops.isfinite(backend.stored_values(g)))
            for g in grads
        ]
        grads = [
            None if g is None else _where(ok, g) for ok, g in zip(finite, grads, strict=True)
        ]
        self._take(grads, finite)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"beta": self.beta, "shrink": self.shrink}


def _where(keep: Any, grad: Any) -> Any:
    return backend.map_values(lambda g: ops.where(keep, g, ops.zeros_like(g)), grad)
