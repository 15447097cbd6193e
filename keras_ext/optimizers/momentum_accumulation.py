"""SGD, Adam, AdamW and LAMB that accumulate gradients inside their momentum.

How, and what of it is exact: see hidden_accumulation.py. Source: kexue.fm/archives/8634.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.numerics import norm
from keras_ext.optimizers.hidden_accumulation import Moment, MomentumAccumulation


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumSGD(MomentumAccumulation):
    """SGD with momentum that updates every `accum_steps` micro-batches. Exact.

        v <- mu v - (rate/k) (g_1 + ... + g_k),    w <- w + v

    is `keras.optimizers.SGD(learning_rate, momentum)` on the batch of all k, without a buffer
    for the sum. A rate set by hand in mid-cycle counts for the gradients after it.

    Args:
        learning_rate: a float, a schedule s(u) of the update u = 0, 1, ..., or a callable.
        momentum: mu, between 0 and 1, both excluded.
        accum_steps: k >= 1, the number of micro-batches per update.
        weight_decay: w <- w (1 - rate * weight_decay) before every update; default none.
        loss_scale_factor: constant that the loss is multiplied with; default none.
        name: name of the optimizer.

    Raises:
        ValueError: Nesterov momentum, clipping, EMA, accumulation by Keras, or no momentum.

    Example:
        >>> optimizer = MomentumAccumSGD(0.01, momentum=0.9, accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # updates as with 32

    Reference: kexue.fm/archives/8634.
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float,
        accum_steps: int,
        weight_decay: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused: Any,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        if momentum == 0:
            raise ValueError(
                "momentum must be a number in (0, 1), got 0. Without momentum there is nothing "
                "to accumulate in: use AccumOptimizer(SGD(...), accum_steps)."
            )
        self.momentum = arguments.number("momentum", momentum, "(0, 1)")

    def moments(self) -> list[Moment]:
        share = -self.learning_rate / self.accum_steps
        return [Moment(self.momentums, self.momentum, share)]

    def step(self, index: int, weight: Any, rate: Any, count: Any) -> Any:
        return self._decayed(index, weight, rate) + self.momentums[index].value

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum}


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumAdam(MomentumAccumulation):
    """Adam that updates every `accum_steps` micro-batches; m is exact, v approximate.

        m <- b1 m + (1 - b1) mean(g_i),    v <- b2 v + (1 - b2) mean(g_i^2)
        w <- w - rate sqrt(1 - b2^u) / (1 - b1^u) m / (sqrt(v) + epsilon)

    at update u = 1, 2, ...; the large batch would have (mean g_i)^2 in v, which is smaller:

        E v_hidden / E v_exact = (mu^2 + sigma^2) / (mu^2 + sigma^2/k)

    per weight, for independent micro-gradients of mean mu and standard deviation sigma. With
    k = 1, or equal micro-gradients, it is `keras.optimizers.Adam`.

    Args:
        learning_rate: a float, a schedule s(u) of the update u = 0, 1, ..., or a callable.
        accum_steps: k >= 1, the number of micro-batches per update.
        beta_1: decay b1 of m per update, in [0, 1); default 0.9.
        beta_2: decay b2 of v per update, in [0, 1); default 0.999.
        epsilon: added to sqrt(v); default 1e-7.
        weight_decay: w <- w (1 - rate * weight_decay) before every update; default none.
        loss_scale_factor: constant that the loss is multiplied with; default none.
        name: name of the optimizer.

    Raises:
        ValueError: AMSGrad, clipping, EMA or accumulation by Keras.

    Example:
        >>> optimizer = MomentumAccumAdam(1e-3, accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # one update

    Reference: kexue.fm/archives/8634; Zhang et al. 2023, arXiv 2305.19982.
    """

    slots = ("momentums", "velocities")

    def __init__(
        self,
        learning_rate: Any,
        accum_steps: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused: Any,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        self.beta_1 = arguments.number("beta_1", beta_1, "[0, 1)")
        self.beta_2 = arguments.number("beta_2", beta_2, "[0, 1)")
        self.epsilon = arguments.number("epsilon", epsilon, "[0, inf)")

    def moments(self) -> list[Moment]:
        b1, b2, k = self.beta_1, self.beta_2, self.accum_steps
        return [
            Moment(self.momentums, b1, (1 - b1) / k),
            Moment(self.velocities, b2, (1 - b2) / k, squared=True),
        ]

    def step(self, index: int, weight: Any, rate: Any, count: Any) -> Any:
        m, v = self.momentums[index].value, self.velocities[index].value
        alpha = rate * ops.sqrt(1 - self.beta_2**count) / (1 - self.beta_1**count)
        return self._decayed(index, weight, rate) - alpha * m / (ops.sqrt(v) + self.epsilon)

    def get_config(self) -> dict[str, Any]:
        keys = ("beta_1", "beta_2", "epsilon")
        return super().get_config() | {key: getattr(self, key) for key in keys}


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumAdamW(MomentumAccumAdam):
    """AdamW that updates every `accum_steps` micro-batches; m is exact, v approximate.

    `MomentumAccumAdam` with a default for the decoupled decay, which acts once per update;
    the law of its second moment is E v_hidden / E v_exact = (mu^2 + sigma^2) / (mu^2 +
    sigma^2/k). With k = 1 it is `keras.optimizers.AdamW`.

    Args:
        learning_rate, accum_steps, beta_1, beta_2, epsilon, loss_scale_factor, name: as in
            `MomentumAccumAdam`.
        weight_decay: w <- w (1 - rate * weight_decay) before every update; default 0.004.

    Raises:
        ValueError: `weight_decay=None`, and what `MomentumAccumAdam` refuses.

    Example:
        >>> optimizer = MomentumAccumAdamW(1e-3, accum_steps=4, weight_decay=0.01)
        >>> optimizer.exclude_from_weight_decay(var_names=["bias"])
        >>> model.compile(optimizer, loss="mse")

    Reference: kexue.fm/archives/8634; Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        learning_rate: Any,
        accum_steps: int,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused: Any,
    ):
        super().__init__(
            learning_rate,
            accum_steps,
            beta_1,
            beta_2,
            epsilon,
            weight_decay,
            loss_scale_factor,
            name,
            **refused,
        )
        if weight_decay is None:
            raise ValueError("weight_decay must be a float, got None: use MomentumAccumAdam.")


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumLamb(MomentumAccumAdam):
    """LAMB that updates every `accum_steps` micro-batches; m is exact, v approximate.

        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon),    w <- w - rate |w|/|u| u

    with m and v of `MomentumAccumAdam`, and its law E v_hidden / E v_exact = (mu^2 + sigma^2)
    / (mu^2 + sigma^2/k). What is common to all weights of a variable in that ratio cancels in
    |w|/|u| (exactly if epsilon = 0); how it differs between them does not. With k = 1 it is
    `keras.optimizers.Lamb`.

    Args:
        learning_rate, accum_steps, beta_1, beta_2, epsilon, weight_decay, loss_scale_factor,
            name: as in `MomentumAccumAdam`.

    Raises:
        ValueError: clipping, EMA or accumulation by Keras.

    Example:
        >>> optimizer = MomentumAccumLamb(1e-3, accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # one update

    Reference: kexue.fm/archives/8634; You et al. 2020, arXiv 1904.00962.
    """

    def step(self, index: int, weight: Any, rate: Any, count: Any) -> Any:
        m, v = self.momentums[index].value, self.velocities[index].value
        m, v = m / (1 - self.beta_1**count), v / (1 - self.beta_2**count)
        weight = self._decayed(index, weight, rate)
        update = m / (ops.sqrt(v) + self.epsilon)
        size, length = norm(weight), norm(update)
        ratio = ops.where((size > 0) & (length > 0), size / length, 1.0)
        return weight - ratio * rate * update
