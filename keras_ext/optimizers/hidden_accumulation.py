"""Gradient accumulation inside the momentum: k small batches, one update, no buffer.

A momentum is a sum of gradients already. Let it decay once per cycle, take in the
micro-batches g_1 .. g_k of the cycle one by one, and move the weights after the k-th:

    m <- b m,    m <- m + (1 - b)/k g_i  for i = 1 .. k,    w <- w - step(m)

The step sees what the large batch, g = (g_1 + ... + g_k)/k, would have left in m. Exact if it
needs nothing else: SGD with momentum, Tiger. Adam, AdamW and LAMB also keep a second moment,
which can take in only g_i^2 where g^2 belongs. That is approximate, and never smaller:

    v <- v + (1 - b)/k g_i^2,    E v / E v_exact = (mu^2 + sigma^2) / (mu^2 + sigma^2/k)

for independent micro-gradients of mean mu and deviation sigma: between 1 (they agree) and k
(they are noise). Steps are then shorter, by up to sqrt(k).

Learning rates, bias correction, decay, constraints and `iterations` see updates, not
micro-batches. Cost: the state of the Keras optimizer (float32 even if the weights are bfloat16)
and one counter; per micro-batch one `m += c g`, of an `Embedding` on TensorFlow in the rows
that occur only. After an update the moments are those of the Keras optimizer.

Not without a buffer: Nesterov and Lion, whose step b1 m + (1 - b1) g needs g apart from the
stored m (so there is no MomentumAccumLion), clipping of g, exact Adam. Use AccumOptimizer.

Source: kexue.fm/archives/8634; for Adam also AdamA, arXiv 2305.19982. Tiger:
kexue.fm/archives/9512, github.com/bojone/tiger.
"""

import warnings
from typing import NamedTuple

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.wrapper import OptimizerWrapper

_MEAN = "needs the mean gradient: use AccumOptimizer(optimizer, accum_steps)"
_CLIPPED_MEAN = (
    "needs the mean gradient: use AccumOptimizer(ClipOptimizer(optimizer, ...), accum_steps). "
    "To clip every micro-batch put ClipOptimizer around this optimizer"
)
REFUSED = {
    "nesterov": _MEAN,
    "clipnorm": _CLIPPED_MEAN,
    "clipvalue": _CLIPPED_MEAN,
    "global_clipnorm": _CLIPPED_MEAN,
    "amsgrad": "would keep the excess of the second moment for ever: use AccumOptimizer",
    "use_ema": "would average every micro-batch: put EMAOptimizer around this optimizer",
    "gradient_accumulation_steps": "is accum_steps here",
}


class Moment(NamedTuple):
    """A moment of all weights: it decays once per cycle and takes in `share` g (or g^2)."""

    variables: list
    decay: float
    share: float
    squared: bool = False

    def add(self, grads: dict):
        """Take in the gradients of the variables with these indices."""
        terms = grads.values()
        if self.squared:  # a sum of repeated rows, not the rows
            terms = [ops.square(backend.densify(g)) for g in terms]
        backend.add_to([self.variables[i] for i in grads], terms, self.share)


class MomentumAccumulation(keras.optimizers.Optimizer):
    """The cycle of micro-batches. A subclass says what moments there are, and what a step is.

    Private names of Keras: `_trainable_variables`, `_use_weight_decay` (the answer to
    `exclude_from_weight_decay`), `_filter_empty_gradients` (its warning), those of `align`.
    """

    slots = ("momentums",)
    align = OptimizerWrapper.align
    add_sum_variable = OptimizerWrapper.add_sum_variable

    def __init__(
        self,
        learning_rate,
        accum_steps: int,
        weight_decay: float | None,
        loss_scale_factor: float | None,
        name: str | None,
        refused: dict,
    ):
        for key, value in refused.items():
            if key not in REFUSED:
                raise TypeError(f"{type(self).__name__} has no argument {key!r}.")
            if value:
                raise ValueError(f"{key}={value!r} {REFUSED[key]}.")
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            loss_scale_factor=loss_scale_factor,
            name=name,
        )
        if isinstance(accum_steps, bool) or not isinstance(accum_steps, int) or accum_steps < 1:
            raise ValueError(f"accum_steps must be an integer >= 1, got {accum_steps!r}.")
        self.accum_steps = accum_steps

    def moments(self) -> list[Moment]:
        raise NotImplementedError

    def step(self, index: int, weight, rate, count):
        """The new weight after the cycle number `count`, whose moments are complete."""
        raise NotImplementedError

    def recover(self, index: int, weight):
        """The new weight after a gradient that was not finite."""
        raise NotImplementedError

    def build(self, variables):
        if self.built:
            return
        super().build(list(variables))
        for slot in self.slots:
            setattr(self, slot, [self._add_moment(v, slot[:-1]) for v in variables])
        self.micro_step = self.add_variable((), dtype="int", name="micro_step")
        # Variables that never had a gradient are left alone: no decay, no momentum.
        self._never_had_gradient = None

    def _add_moment(self, variable, name):
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{variable.path} takes its gradient as its value (float8 training): a mean of "
                f"gradients has no meaning there. Train it without {type(self).__name__}."
            )
        return self.add_sum_variable(variable, name)

    def apply(self, grads, trainable_variables=None):
        """Take in one micro-batch; every `accum_steps` of them, update."""
        grads = self.align(grads, trainable_variables)
        self._filter_empty_gradients(grads, self._trainable_variables)
        # Summed over the replicas before anything is squared.
        backend.merge_replicas(self._take, grads)

    def _take(self, grads, finite=None):
        """One micro-batch. Where `finite[i]` is false, variable `i` only recovers."""
        absent = {i for i, g in enumerate(grads) if g is None}
        seen_before = self._never_had_gradient
        self._never_had_gradient = absent if seen_before is None else seen_before & absent
        present = {i: self._unscaled(g, i) for i, g in enumerate(grads) if g is not None}
        moments = self.moments()

        # A moment is written before the conditional that reads it, never in it, and only one
        # conditional writes a weight: so XLA needs no copies.
        def decay():
            for moment in moments:
                for i, m in enumerate(moment.variables):
                    new = moment.decay * m.value
                    m.assign(new if finite is None else ops.where(finite[i], new, m.value))

        backend.run_if(
            ops.equal(self.micro_step, 0),
            decay,
            variables=[m for moment in moments for m in moment.variables],
        )
        for moment in moments:
            moment.add(present)
        self.micro_step.assign_add(1)
        last = self.micro_step >= self.accum_steps
        any_bad = False if finite is None else ops.logical_not(ops.all(ops.stack(finite)))
        backend.run_if(
            ops.logical_or(last, any_bad),
            lambda: self._update(last, finite),
            variables=self._trainable_variables + self.variables,
        )

    def _unscaled(self, grad, index):
        def unscale(g):
            g = ops.cast(g, self.momentums[index].dtype)
            return g if self.loss_scale_factor is None else g / self.loss_scale_factor

        return backend.map_values(unscale, grad)

    def _update(self, last, finite):
        for i, variable in enumerate(self._trainable_variables):
            if i in self._never_had_gradient:
                continue
            dtype = self.momentums[i].dtype
            weight = ops.cast(variable.value, dtype)
            rate = ops.cast(self.learning_rate, dtype)
            count = ops.cast(self.iterations + 1, dtype)
            new = self.step(i, weight, rate, count)
            if finite is not None:
                new = ops.where(last, new, weight)
                new = ops.where(finite[i], new, self.recover(i, weight))
            variable.assign(new)
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        self.iterations.assign_add(ops.cast(last, self.iterations.dtype))
        self.micro_step.assign(ops.where(last, 0, self.micro_step.value))

    def _decayed(self, index, weight, rate):
        """Decoupled weight decay, as in `keras.optimizers`: before the step."""
        if self.weight_decay and self._use_weight_decay(self._trainable_variables[index]):
            return weight - weight * self.weight_decay * rate
        return weight

    def finalize_variable_values(self, var_list):
        """End of `fit`: what the moments took in cannot be told apart any more, so it stays."""
        if not self.built or not backend.has_value(self.micro_step):
            return  # fit failed before or in its first step: let its own error be seen
        pending = int(ops.convert_to_numpy(self.micro_step))
        if pending:
            warnings.warn(
                f"fit ended with {pending} of {self.accum_steps} micro-batches in the current "
                "cycle: they stay in the moments, and the next fit goes on with the cycle.",
                stacklevel=2,
            )

    def get_config(self):
        config = super().get_config()
        keys = ("name", "learning_rate", "weight_decay", "loss_scale_factor")
        return {key: config[key] for key in keys} | {"accum_steps": self.accum_steps}


def checked_decay(name, value):
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
    return value
