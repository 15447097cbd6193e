"""Adafactor with momentum, steps relative to the weights, and a threshold for factoring.

At update t = 1, 2, ... a weight w with gradient g moves by

    v <- beta_2 v + (1 - beta_2) (g^2 + epsilon_1),       beta_2 = 1 - t^-0.8 by default
    u <- g / sqrt(v + epsilon_1)
    u <- u / max(1, RMS(u) / clipping_threshold)
    m <- beta_1 m + (1 - beta_1) u                        (m = u if beta_1 = 0)
    w <- w - learning_rate max(epsilon_2, RMS(w)) m

beta_2 = 0 at t = 1, so v needs no bias correction; with a fixed beta_2 the first v are too
small, which the clipping of u makes good. m starts at zero and is not corrected.

Factored: of a v of two or more dimensions only the means over each of its two largest axes
are kept, r and c, and v is taken as (r / mean(r)) c. That is exact where g^2 is an outer
product in these axes, an approximation elsewhere, and needs rows + columns numbers instead of
rows * columns. Axes shorter than `min_dim_size_to_factor` are not worth it.

The order is bert4keras's `AdaFactor`. Without momentum it is the paper's algorithm and
`keras.optimizers.Adafactor`'s (which has no momentum and no threshold, always factors the last
two axes, and keeps a full-size v all the same). What differs, and why:

* momentum averages u, so that the learning rate and RMS(w) act at once. Mesh TensorFlow and
  optax average the scaled steps: the same as long as these two stay as they are;
* epsilon_1 stands under the root as well (bert4keras does so, the paper not): a factored v can
  underflow to 0 where a row and a column had no gradient, and 0 / 0 would be NaN;
* r is divided before the product, as in the paper: r c underflows for gradients below 1e-10.

Source: Shazeer and Stern 2018, arXiv 1804.04235; bert4keras, `optimizers.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import arguments, backend
from keras_ext.numerics import at_least_float32, rms
from keras_ext.optimizers.base import is_overwritten, layout_of, variable_index
from keras_ext.optimizers.schedules import InverseSquareRoot
from keras_ext.optimizers.selection import Selectable, Selection


@keras.saving.register_keras_serializable(package="keras_ext")
class RelativeAdafactor(keras.optimizers.Optimizer):
    """Adafactor with momentum: little memory, and steps in units of RMS(w).

    One learning rate serves weights of any scale: an update changes a weight of root mean
    square R by about `learning_rate * R`. So learning rates are larger than Adam's: 5e-4 here
    moves kernels of R = 0.04 as 2e-5 does there. State in float32: m only if beta_1 > 0; v, or
    of factored weights its row and column means.

    Args:
        learning_rate: a number, a schedule, or None for min(1 / sqrt(t), 1e-2); relative to
            the RMS of each weight, see `exclude_from_parameter_scale`.
        beta_1: momentum of the updates, 0 <= beta_1 < 1; 0 keeps no m.
        beta_2: decay of v, 0 <= beta_2 < 1, or None for 1 - t^-0.8.
        epsilon_1: > 0, added to the squared gradient.
        epsilon_2: > 0, lower limit of the RMS(w) that scales a step.
        clipping_threshold: > 0, upper limit of RMS(u) per weight, or None for none.
        min_dim_size_to_factor: factor v if its two largest axes are at least this long; a
            large number, 10**6, for no factoring.
        exclude_from_parameter_scale: weights whose step is not multiplied by max(epsilon_2,
            RMS(w)): regular expressions searched in `variable.path`, layers, variables, or a
            list of these.
        name: name of the optimizer.
        **kwargs: those of `keras.optimizers.Optimizer`: weight_decay, clipnorm, and so on.

    Raises:
        ValueError: a number out of its range, or an unknown argument.

    On TensorFlow gradients of embeddings are made dense first, so repeated tokens are summed
    before they are squared or clipped.

    Example:
        >>> optimizer = RelativeAdafactor(5e-4, beta_1=0.9, min_dim_size_to_factor=10**6)
        >>> model.compile(optimizer, loss="mse")  # as CLUE-bert4keras trains
        >>> history = model.fit(x, y, verbose=0)

    Reference: Shazeer and Stern 2018, arXiv 1804.04235.
    """

    def __init__(
        self,
        learning_rate: float | Callable | None = 1e-3,
        beta_1: float = 0.0,
        beta_2: float | None = None,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clipping_threshold: float | None = 1.0,
        min_dim_size_to_factor: int = 128,
        exclude_from_parameter_scale: Selectable | Sequence[Selectable] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        if learning_rate is None:
            learning_rate = InverseSquareRoot()
        # Keras refuses the keyword arguments that it does not know.
        super().__init__(arguments.learning_rate(learning_rate), name=name, **kwargs)
        self.beta_1 = arguments.number("beta_1", beta_1, "[0, 1)")
        self.beta_2 = None if beta_2 is None else arguments.number("beta_2", beta_2, "[0, 1)")
        self.epsilon_1 = arguments.number("epsilon_1", epsilon_1, "(0, inf)")
        self.epsilon_2 = arguments.number("epsilon_2", epsilon_2, "(0, inf)")
        if clipping_threshold is not None:
            clipping_threshold = arguments.number(
                "clipping_threshold", clipping_threshold, "(0, inf)"
            )
        self.clipping_threshold = clipping_threshold
        self.min_dim_size_to_factor = arguments.integer(
            "min_dim_size_to_factor", min_dim_size_to_factor
        )
        self.exclude_from_parameter_scale = Selection(
            "exclude_from_parameter_scale", exclude_from_parameter_scale
        )

    def build(self, variables: list) -> None:
        if self.built:
            return
        super().build(variables)
        self._momentums, self._velocities, self._rows, self._columns = [], [], [], []
        self._axes = [factored_axes(v.shape, self.min_dim_size_to_factor) for v in variables]
        excluded = self.exclude_from_parameter_scale.indices(variables)
        self._scaled = [i not in excluded for i in range(len(variables))]
        for variable, axes in zip(variables, self._axes, strict=True):
            m = v = r = c = None
            # Float8 training takes the gradient of some variables as their value: no state.
            if not is_overwritten(variable):
                if self.beta_1 > 0:
                    m = self._add_state(variable, "momentum")
                if axes is None:
                    v = self._add_state(variable, "velocity")
                else:
                    second, largest = axes
                    r = self._add_state(variable, "row", over=largest)
                    c = self._add_state(variable, "column", over=second)
            self._momentums.append(m)
            self._velocities.append(v)
            self._rows.append(r)
            self._columns.append(c)

    def _add_state(
        self, variable: keras.Variable, name: str, over: int | None = None
    ) -> keras.Variable:
        """A float32 variable of the shape of the weight, or of its mean over one axis."""
        shape = [1 if axis == over else size for axis, size in enumerate(variable.shape)]
        return self.add_variable(
            shape,
            dtype=at_least_float32(variable.dtype),
            layout=layout_of(variable) if over is None else None,
            name=f"{variable.path.replace('/', '_')}_{name}",
        )

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply([_as_one_tensor(g) for g in grads], trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = variable_index(self, variable)
        dtype = at_least_float32(variable.dtype)
        gradient = ops.cast(gradient, dtype)
        step = gradient / ops.sqrt(self._mean_square(index, gradient) + self.epsilon_1)
        if self.clipping_threshold is not None:
            step = step / ops.maximum(1.0, rms(step) / self.clipping_threshold)
        if self.beta_1 > 0:
            m = self._momentums[index]
            step = self.beta_1 * ops.cast(m, dtype) + (1 - self.beta_1) * step
            self.assign(m, step)
        weight = ops.cast(variable, dtype)
        if self._scaled[index]:
            step = ops.maximum(self.epsilon_2, rms(weight)) * step
        weight = weight - ops.cast(learning_rate, dtype) * step
        self.assign(variable, ops.cast(weight, variable.dtype))

    def _mean_square(self, index: int, gradient: Any) -> Any:
        """The moving average v of the squared gradient, brought up to date."""
        if self.beta_2 is None:  # 1 - beta_2, without cancellation
            share = ops.power(ops.cast(self.iterations + 1, gradient.dtype), -0.8)
        else:
            share = 1 - self.beta_2
        square = ops.square(gradient) + self.epsilon_1

        def average(state: keras.Variable, value: Any) -> Any:
            value = (1 - share) * ops.cast(state, gradient.dtype) + share * value
            self.assign(state, value)
            return value

        axes = self._axes[index]
        if axes is None:
            return average(self._velocities[index], square)
        second, largest = axes
        r = average(self._rows[index], ops.mean(square, axis=largest, keepdims=True))
        c = average(self._columns[index], ops.mean(square, axis=second, keepdims=True))
        return r / ops.mean(r, axis=second, keepdims=True) * c

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon_1": self.epsilon_1,
            "epsilon_2": self.epsilon_2,
            "clipping_threshold": self.clipping_threshold,
            "min_dim_size_to_factor": self.min_dim_size_to_factor,
            "exclude_from_parameter_scale": self.exclude_from_parameter_scale.config(),
        }


def factored_axes(shape: Sequence[int], min_size: int) -> tuple[int, int] | None:
    """The second largest and the largest axis (the later of equal ones), if long enough."""
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (second, largest) if shape[second] >= min_size else None


def _as_one_tensor(gradient: Any) -> Any:
    if gradient is None:
        return None
    return backend.densify(
        ops.convert_to_tensor(gradient) if isinstance(gradient, np.ndarray) else gradient
    )
