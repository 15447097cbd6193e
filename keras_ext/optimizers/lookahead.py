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

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.wrapper import UpdateWrapper


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

    tracks_weights = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        sync_period: int = 5,
        slow_step_size: float = 0.5,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        if isinstance(sync_period, bool) or not isinstance(sync_period, int) or sync_period < 1:
            raise ValueError(f"sync_period must be an integer >= 1, got {sync_period!r}.")
        if not 0 < slow_step_size <= 1:
            raise ValueError(f"slow_step_size must be in (0, 1], got {slow_step_size!r}.")
        self.sync_period = sync_period
        self.slow_step_size = slow_step_size

    def build(self, variables):
        self.cycle_step = self.add_variable((), dtype="int", name="cycle_step")
        super().build(variables)
        self.slow_weights = [self.add_sum_variable(v, "slow") for v in self.inner_variables]

    def _apply(self, grads):
        state = self.inner_variables + self.own_variables
        started = backend.run_if(self.cycle_step == 0, self._start, variables=state)
        updates = self.iterations + 0  # a tensor: the variable itself is about to change
        self.apply_inner(grads, after=[started, updates])
        self.cycle_step.assign_add(ops.cast(self.iterations != updates, self.cycle_step.dtype))
        backend.run_if(self.cycle_step >= self.sync_period, self._sync, variables=state)

    def _start(self):
        """q <- p; but where p is still q rounded to bfloat16, keep the digits of q."""
        for slow, variable in zip(self.slow_weights, self.inner_variables, strict=True):
            q, p = slow.value, variable.value
            unmoved = ops.equal(ops.cast(q, variable.dtype), p)
            slow.assign(ops.where(unmoved, q, ops.cast(p, slow.dtype)))

    def _sync(self):
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

    def finalize_variable_values(self, var_list):
        """End of `fit`: a last sync, after what the inner optimizer has left to do."""
        if not self.built or not backend.has_value(self.cycle_step):
            return  # fit failed before or in its first step: let its own error be seen
        begun = int(ops.convert_to_numpy(self.cycle_step)) > 0
        updates = int(ops.convert_to_numpy(self.iterations))
        super().finalize_variable_values(var_list)
        if begun or int(ops.convert_to_numpy(self.iterations)) != updates:
            self._sync()

    def get_config(self):
        return super().get_config() | {
            "sync_period": self.sync_period,
            "slow_step_size": self.slow_step_size,
        }
