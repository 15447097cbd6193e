"""Lookahead: k steps forward, one step back.

The inner optimizer moves the weights p as always. After every k of its updates the slow
weights q, which start where p starts, follow part of the way, and p goes on from there:

    q <- q + a (p - q),    p <- q

Exact; two cases show what it does. With a = 1 it is the inner optimizer, with k = 1 and plain
SGD it is SGD with the learning rate a lr. On a quadratic loss of curvature L, where a step of
SGD is p <- (1 - lr L) p, a cycle is

    q <- (1 - a) q + a (1 - lr L)^k q

Cost: one float32 copy of the weights, read and written twice in k updates.

Not the slow weights of bert4keras, which start at zero: there the first cycle multiplies the
weights by a. The moments of the inner optimizer are kept at a sync (the paper's default), and
so are the statistics of batch normalisation, which follow p.

Source: Zhang et al. 2019, arXiv 1907.08610; kexue.fm/archives/6869.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.optimizers.update_wrapper import UpdateWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class LookaheadOptimizer(UpdateWrapper):
    """Every `sync_period` updates, go back towards the weights of one period before.

        q <- q + slow_step_size (p - q),    p <- q

    Periods are counted in real updates of the inner optimizer: around an `AccumOptimizer`
    micro-batches do not count. A period starts from the weights as they are then, whether
    trained, loaded or assigned. The end of `fit` ends the period with a sync, so the model is
    left with its slow weights; inside `fit` validation and checkpoints see p (equal to q if
    an epoch has a multiple of `sync_period` updates).

    With `slow_step_size=1` it is the inner optimizer, except that on TensorFlow the repeated
    tokens of an `Embedding` are summed before Adam squares them (Keras squares them one by
    one).

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        sync_period: k >= 1, number of updates between two syncs.
        slow_step_size: a, 0 < a <= 1.
        name: name of the wrapper.

    Raises:
        ValueError: a number out of its range, or something inside follows the weights, a
            moving average for instance: `EMAOptimizer` goes outside.

    Example:
        >>> optimizer = LookaheadOptimizer(keras.optimizers.Adam(1e-3), sync_period=5)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)

    Reference: Zhang et al. 2019, arXiv 1907.08610; kexue.fm/archives/6869.
    """

    follows_weights = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        sync_period: int = 5,
        slow_step_size: float = 0.5,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.sync_period = arguments.integer("sync_period", sync_period)
        self.slow_step_size = arguments.number("slow_step_size", slow_step_size, "(0, 1]")

    def build(self, variables: list) -> None:
        self.cycle_step = self.add_variable((), dtype="int", name="cycle_step")
        super().build(variables)
        self.slow_weights = [self.add_sum_variable(v, "slow") for v in self.inner_variables]

    def update(self, grads: list) -> None:
        started = self.when(self.cycle_step == 0, self._start)
        updated = self.step_inner(grads, after=[started])
        self.cycle_step.assign_add(ops.cast(updated, self.cycle_step.dtype))
        self.when(self.cycle_step >= self.sync_period, self._sync)

    def _start(self) -> None:
        """q <- p; but where p is still q rounded to bfloat16, keep the digits of q."""
        for slow, variable in zip(self.slow_weights, self.inner_variables, strict=True):
            q, p = slow.value, variable.value
            unmoved = ops.equal(ops.cast(q, variable.dtype), p)
            slow.assign(ops.where(unmoved, q, ops.cast(p, slow.dtype)))

    def _sync(self) -> None:
        for slow, variable in zip(self.slow_weights, self.inner_variables, strict=True):
            q, p = slow.value, ops.cast(variable.value, slow.dtype)
            # q + a (p - q), written from p: exactly p for a = 1, and where p = q.
            q = p + (1 - self.slow_step_size) * (q - p)
            slow.assign(q)
            # A copy: on JAX a step that is given p may reuse its memory.
            variable.assign(ops.copy(ops.cast(q, variable.dtype)))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        self.cycle_step.assign(ops.zeros((), self.cycle_step.dtype))

    def end_of_fit(self, finish_inner: Any) -> None:
        """A last sync, after what the inner optimizer has left to do."""
        begun = int(ops.convert_to_numpy(self.cycle_step)) > 0
        if finish_inner() or begun:
            self._sync()

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "sync_period": self.sync_period,
            "slow_step_size": self.slow_step_size,
        }
