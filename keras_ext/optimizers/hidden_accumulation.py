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
from typing import Any, NamedTuple

from keras import ops

from keras_ext import arguments, backend
from keras_ext.optimizers.base import BaseOptimizer, refuse_overwritten
from keras_ext.optimizers.wrapper import in_doubt

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
    share: Any
    squared: bool = False

    def add(self, grads: dict[int, Any]) -> None:
        """Take in the gradients of the variables with these indices."""
        terms = list(grads.values())
        if self.squared:  # a sum of repeated rows, not the rows
            terms = [ops.square(backend.densify(g)) for g in terms]
        backend.add_to([self.variables[i] for i in grads], terms, self.share)


class MomentumAccumulation(BaseOptimizer):
    """The cycle of micro-batches. A subclass says what its moments are, and what a step is."""

    sums_rows = False  # they are scattered into the moments
    slots: tuple[str, ...] = ("momentums",)

    def __init__(
        self,
        learning_rate: Any,
        accum_steps: int,
        weight_decay: float | None,
        loss_scale_factor: float | None,
        name: str | None,
        refused: dict[str, Any],
    ):
        for key, value in refused.items():
            if key not in REFUSED:
                raise TypeError(f"{type(self).__name__} has no argument {key!r}.")
            if value:
                raise ValueError(f"{key}={value!r} {REFUSED[key]}.")
        super().__init__(
            arguments.learning_rate(learning_rate),
            weight_decay=weight_decay,
            loss_scale_factor=loss_scale_factor,
            name=name,
        )
        self.accum_steps = arguments.integer("accum_steps", accum_steps)

    @property
    def accumulates(self) -> bool:
        return self.accum_steps > 1

    def moments(self) -> list[Moment]:
        raise NotImplementedError

    def step(self, index: int, weight: Any, rate: Any, count: Any) -> Any:
        """The new weight after the cycle number `count`, whose moments are complete."""
        raise NotImplementedError

    def recover(self, index: int, weight: Any) -> Any:
        """The new weight after a gradient that was not finite."""
        raise NotImplementedError

    def build(self, variables: list) -> None:
        if self.built:
            return
        refuse_overwritten(self, variables)
        super().build(variables)
        for slot in self.slots:
            setattr(self, slot, [self.add_sum_variable(v, slot[:-1]) for v in variables])
        self.micro_step = self.add_variable((), dtype="int", name="micro_step")
        # Which variables had a gradient in this cycle; the others are left alone: no decay, no
        # momentum. A fact of the cycle, not of a trace.
        self.had_gradient = self.add_variable(
            (len(variables),), dtype="bool", name="had_gradient"
        )

    def update(self, grads: list) -> None:
        self._take(grads)

    def _take(self, grads: list, finite: list | None = None) -> None:
        """One micro-batch. Where `finite[i]` is false, variable `i` only recovers."""
        present = {i: self._unscaled(g, i) for i, g in enumerate(grads) if g is not None}
        moments = self.moments()
        first = ops.equal(self.micro_step, 0)
        before = ops.logical_and(self.had_gradient, ops.logical_not(first))
        given = [ops.convert_to_tensor(self._is_given(i, g)) for i, g in enumerate(grads)]
        now = ops.logical_or(before, ops.stack(given))
        self.had_gradient.assign(now)
        fresh = ops.logical_and(now, ops.logical_not(before))

        # A moment is written before the conditional that reads it, never in it, and only one
        # conditional writes a weight: so XLA needs no copies.
        def decay() -> None:
            for moment in moments:
                for i in present:
                    m = moment.variables[i]
                    due = fresh[i] if finite is None else ops.logical_and(fresh[i], finite[i])
                    factors = (ops.convert_to_tensor(x, m.dtype) for x in (moment.decay, 1.0))
                    m.assign(m.value * ops.where(due, *factors))

        self.when(ops.any(fresh), decay)
        for moment in moments:
            moment.add(present)
        self.micro_step.assign_add(1)
        last = self.micro_step >= self.accum_steps
        any_bad = False if finite is None else ops.logical_not(ops.all(ops.stack(finite)))
        self.when(
            ops.logical_or(last, any_bad), lambda: self._update(last, finite, list(present))
        )

    def _is_given(self, index: int, grad: Any) -> Any:
        if grad is None:
            return False
        flag = in_doubt(self.model_variables[index])
        return True if flag is None else flag

    def _unscaled(self, grad: Any, index: int) -> Any:
        def unscale(g: Any) -> Any:
            g = ops.cast(g, self.momentums[index].dtype)
            return g if self.loss_scale_factor is None else g / self.loss_scale_factor

        return backend.map_values(unscale, grad)

    def _update(self, last: Any, finite: list | None, present: list[int]) -> None:
        variables = self.model_variables
        # Of those without a gradient now, the state tells whether they had one in the cycle.
        others = [i for i in range(len(variables)) if i not in set(present)]
        others = [i for i in others if not self.is_frozen(variables[i])]
        doubtful = [i for i in present if in_doubt(variables[i]) is not None]
        for i in present:
            self._step_one(i, last, finite, self.had_gradient[i] if i in doubtful else True)
        if others:
            had = [self.had_gradient[i] for i in others]

            def step_others() -> None:
                for i in others:
                    self._step_one(i, last, finite, self.had_gradient[i])

            self.when(ops.any(ops.stack(had)), step_others)
        self.iterations.assign_add(ops.cast(last, self.iterations.dtype))
        self.micro_step.assign(ops.where(last, 0, self.micro_step.value))

    def _step_one(self, index: int, last: Any, finite: list | None, had: Any) -> None:
        variable = self.model_variables[index]
        dtype = self.momentums[index].dtype
        weight = ops.cast(variable.value, dtype)
        rate = ops.cast(self.learning_rate, dtype)
        count = ops.cast(self.iterations + 1, dtype)
        new = self.step(index, weight, rate, count)
        if finite is not None:
            new = ops.where(last, new, weight)
            new = ops.where(finite[index], new, self.recover(index, weight))
        certain = isinstance(had, bool)
        variable.assign(new if certain else ops.where(had, new, weight))
        if variable.constraint is not None:
            value = variable.constraint(variable)
            variable.assign(value if certain else ops.where(had, value, variable.value))

    def _decayed(self, index: int, weight: Any, rate: Any) -> Any:
        """Decoupled weight decay, as in `keras.optimizers`: before the step."""
        if self.weight_decay and self.decays(self.model_variables[index]):
            return weight - weight * self.weight_decay * rate
        return weight

    def end_of_fit(self, finish_inner: Any) -> None:
        """What the moments took in cannot be told apart any more, so it stays."""
        pending = int(ops.convert_to_numpy(self.micro_step))
        if pending:
            warnings.warn(
                f"fit ended with {pending} of {self.accum_steps} micro-batches in the current "
                "cycle: they stay in the moments, and the next fit goes on with the cycle.",
                stacklevel=3,  # the caller of finalize_variable_values
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        keys = ("name", "learning_rate", "weight_decay", "loss_scale_factor")
        return {key: config[key] for key in keys} | {"accum_steps": self.accum_steps}
