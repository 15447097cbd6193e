"""Bias-corrected moving average of the weights.

After update t of a training with weights w_1, w_2, ... the average is the weighted mean

    a_t = (w_t + mu w_{t-1} + ... + mu^{t-1} w_1) / (1 + mu + ... + mu^{t-1})

which is the moving average m_t = mu m_{t-1} + (1 - mu) w_t, m_0 = 0, divided by 1 - mu^t. It
is kept in that form, because

    (1 - mu^t) a_t = mu (1 - mu^{t-1}) a_{t-1} + (1 - mu) w_t
                   = (1 - mu^t) a_{t-1} + (1 - mu) (w_t - a_{t-1})

is one addition per update:

    a_t = a_{t-1} + (1 - mu) / (1 - mu^t) (w_t - a_{t-1})

So a_1 = w_1, early on a_t is close to the plain mean of all weights so far, and later an
average over the last 1 / (1 - mu). Exact. Cost: one float32 copy of the weights, and one pass
over both per update.

What `use_ema=True` of a Keras optimizer does differently: its average starts at w_1 without a
correction, which at mu = 0.999 still has 90 % of w_1 in it after 100 updates (1 % here); it
moves at every micro-batch of an accumulation; it is taken before constraints; and `fit`
overwrites the weights with it at its end.

Source: Kingma and Ba 2015, arXiv 1412.6980, section 7.2; kexue.fm/archives/6575.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.optimizers.wrapper import OptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class EMAOptimizer(OptimizerWrapper):
    """Keep a bias-corrected exponential moving average of the weights. They train as before.

        average <- average + (1 - momentum) / (1 - momentum^t) (weight - average)

    t counts real updates of the inner optimizer: around an `AccumOptimizer` nothing moves on
    micro-batches. The weights are taken as the inner optimizer leaves them, constraints
    included. The average is saved with the optimizer. (On TensorFlow the repeated tokens of
    an `Embedding` are summed before Adam squares them; Keras squares them one by one.)

    `fit` leaves the weights alone. `training.EvaluateWithEMA` evaluates with the average,
    `assign_averages` puts it in place for good. Both leave alone what is not trained, such as
    the statistics of batch normalisation.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        momentum: mu, 0 < mu < 1; the average covers about the last 1 / (1 - mu) updates.
        name: name of the wrapper.

    Attributes:
        averages: the averages, one variable per weight; zeros before the first update.
        updates: t, the number of updates that they cover.

    Example:
        >>> model.compile(EMAOptimizer(keras.optimizers.Adam(1e-3), momentum=0.99), loss="mse")
        >>> history = model.fit(x, y, verbose=0)
        >>> model.optimizer.assign_averages()

    Reference: Kingma and Ba 2015, arXiv 1412.6980, section 7.2; kexue.fm/archives/6575.
    """

    follows_weights = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        momentum: float = 0.999,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.momentum = arguments.number("momentum", momentum, "(0, 1)")

    def build(self, variables: list) -> None:
        self.updates = self.add_variable((), dtype="int", name="updates")
        super().build(variables)
        self.averages = [self.add_sum_variable(v, "average") for v in self.inner_variables]

    def update(self, grads: list) -> None:
        self.when(self.step_inner(grads), self._average)

    def _average(self) -> None:
        self.updates.assign_add(1)
        for average, variable in zip(self.averages, self.inner_variables, strict=True):
            difference = ops.cast(variable, average.dtype) - average
            average.assign(average + self._share(average.dtype) * difference)

    def _share(self, dtype: str) -> Any:
        """(1 - mu) / (1 - mu^t), without cancellation, and exactly 1 at t = 1."""
        t = ops.cast(self.updates, dtype)
        share = (1 - self.momentum) / -ops.expm1(t * math.log(self.momentum))
        return ops.where(self.updates > 1, share, ops.ones_like(share))

    def assign_averages(self) -> None:
        """Overwrite the weights with their averages. Before the first update: do nothing."""
        if self.built and int(ops.convert_to_numpy(self.updates)) > 0:
            for average, variable in zip(self.averages, self.inner_variables, strict=True):
                # A copy: on JAX a step that is given the weight may reuse its memory.
                variable.assign(ops.copy(ops.cast(average, variable.dtype)))

    def end_of_fit(self, finish_inner: Any) -> None:
        """The average covers a last update, if the inner optimizer makes one."""
        if finish_inner():
            self._average()

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum}
