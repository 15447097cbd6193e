"""Gradient accumulation: k small batches, one update, the weights of the large batch.

A cycle is k micro-batches with gradients g_1 .. g_k, all taken at the same weights. Then
the inner optimizer makes one step with

    g = (w_1 g_1 + ... + w_k g_k) / (w_1 + ... + w_k)        (w_i = 1 by default)

If g_i is the gradient of a mean over n_i examples, w_i = n_i makes g the gradient of the
mean over the union, whatever the sizes; w_i = 1 does so when they are equal.

Exact: everything but what depends on the batch inside the model (dropout draws, batch
normalisation statistics). Rounding: sums are kept in float32 and divided once. Order:
unscale the loss, sum rows of repeated tokens, accumulate, clip, decay, update; so schedules,
bias correction, weight decay, moving averages of the weights, constraints and `iterations`
see real updates only. A weight that has no gradient in the whole cycle is left alone, and so
is its inner state: no decay, no momentum. Cost: one float32 buffer of the size of the weights,
and one addition per micro-batch; the inner update does not run between updates.

Source: kexue.fm/archives/6794.
"""

import warnings
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_ext import arguments, backend
from keras_ext.numerics import all_finite, at_least_float32
from keras_ext.optimizers import nesting
from keras_ext.optimizers.base import carries_batch_weight, refuse_overwritten
from keras_ext.optimizers.wrapper import OptimizerWrapper, had_gradient

REMAINDERS = ("apply", "carry", "drop")
NONFINITE = ("propagate", "skip")


@keras.saving.register_keras_serializable(package="keras_ext")
class AccumOptimizer(OptimizerWrapper):
    """Update every `accum_steps` micro-batches, with the mean of their gradients.

    Equal to one step of the inner optimizer on the batch of all of them. With
    `accum_steps=1` it is the inner optimizer, except that on TensorFlow the repeated tokens
    of an `Embedding` are summed before Adam squares them (Keras squares them one by one).

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        accum_steps: k >= 1, the number of micro-batches per update.
        remainder: what `fit` does at its end with a cycle of j < k micro-batches.
            "apply" (default): one update with the mean of the j. Keras ends `fit` with it
            after the last validation and the last checkpoint of the epoch, so the final
            weights may be one update further than those. "carry": keep them for the next
            `fit`. "drop": forget them. Each warns when there is a remainder.
        nonfinite: what to do with a micro-batch that has an infinite or NaN gradient.
            "propagate" (default): as the inner optimizer would. "skip": leave it out of the
            cycle, which then waits for k finite ones, and count it in `skipped`. (Inside a
            `LossScaleOptimizer` no such batch arrives; around one it is refused, since the
            loss scale could never fall.)
        name: name of the wrapper.

    Attributes:
        micro_step: micro-batches in the current cycle, 0 to k - 1.
        skipped: micro-batches skipped so far.
        had_gradient: for every weight, whether it had a gradient in the current cycle.

    Raises:
        ValueError: a bad argument, or something inside accumulates as well; in a compiled step,
            if a weight has a gradient in some steps only and an optimizer inside cannot leave
            it out (`use_ema`, or state that is not a list with an entry per weight).

    Under mixed_float16 `compile` puts a `LossScaleOptimizer` outside. While its scale falls
    after an overflow, it leaves out one micro-batch here and all of the large batch there, so
    the two runs see other examples; as long as nothing overflows they agree to rounding.

    Unequal micro-batches: in a step of your own pass `apply(grads, variables, weight=n)` or
    `stateless_apply(..., weight=n)`; in `fit` let the model tell the weights,
    `model = keras_ext.training.with_objective(model, [])`. Under a plain `keras.Model` all
    micro-batches count the same, also the last of an epoch, which has fewer examples. A cycle
    whose weights sum to zero has a zero gradient.

    Under `tf.distribute.MirroredStrategy` the gradients are summed over the replicas at every
    micro-batch, and clipping inside sees their sum (the weight of a micro-batch may differ
    by replica). There `LossScaleOptimizer` goes outside.

    Example:
        >>> optimizer = AccumOptimizer(keras.optimizers.Adam(1e-3), accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # updates as with 32

    Reference: kexue.fm/archives/6794.
    """

    sums_rows = False  # they are scattered into the sums
    takes_batch_weight = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        accum_steps: int,
        remainder: Literal["apply", "carry", "drop"] = "apply",
        nonfinite: Literal["propagate", "skip"] = "propagate",
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.accum_steps = arguments.integer("accum_steps", accum_steps)
        self.remainder = arguments.choice("remainder", remainder, REMAINDERS)
        self.nonfinite = arguments.choice("nonfinite", nonfinite, NONFINITE)
        nesting.refuse(
            self,
            lambda inner: nesting.accumulates(inner) or isinstance(inner, AccumOptimizer),
            "optimizer {name!r} already accumulates gradients. Set the number of steps in one "
            "place: AccumOptimizer(optimizer, accum_steps).",
        )
        if nonfinite == "skip":
            nesting.refuse(
                self,
                nesting.scales_loss,
                'nonfinite="skip" keeps overflows from the {kind} {name!r} inside, whose scale '
                "could then never fall. Put it outside, or use "
                'nonfinite="propagate".',
            )

    @property
    def accumulates(self) -> bool:
        return self.accum_steps > 1

    def build(self, variables: list) -> None:
        refuse_overwritten(self, variables)
        self.micro_step = self.add_variable((), dtype="int", name="micro_step")
        self.weight_sum = self.add_variable((), dtype="float32", name="weight_sum")
        self.skipped = self.add_variable((), dtype="int", name="skipped")
        super().build(variables)
        inner = self.inner_variables
        self.accumulators = [self.add_sum_variable(v, "accumulator") for v in inner]
        # Which of them had a gradient in this cycle. A fact of the cycle, not of a trace: the
        # steps of a cycle may be traced apart, and saved and loaded in between.
        self.had_gradient = self.add_variable((len(inner),), dtype="bool", name="had_gradient")

    @property
    def inner_variables(self) -> list:
        return [v for v in self.model_variables if not carries_batch_weight(v)]

    def stateless_apply(
        self,
        optimizer_variables: list,
        grads: list,
        trainable_variables: list,
        weight: Any = None,
    ) -> tuple[list, list]:
        """`apply` as a pure function, for steps written in JAX.

        Returns: the new values of the trainable variables and of `self.variables`.
        """
        if weight is None:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        variables = self.model_variables + self.variables
        values = [*trainable_variables, *optimizer_variables]
        values = backend.values_after(
            lambda: self.apply(grads, weight=weight), variables, values
        )
        count = len(self.model_variables)
        return values[:count], values[count:]

    def in_replica(self, grads: list, weight: Any) -> tuple[list, list]:
        """Multiply the gradients by the weight of the batch, which the model may carry."""
        pairs = list(zip(grads, self.model_variables, strict=True))
        grads = [g for g, v in pairs if not carries_batch_weight(v)]
        if weight is None:
            weight = next((g for g, v in pairs if carries_batch_weight(v)), None)
        if weight is not None:
            weight = ops.cast(weight, "float32")
            grads = [_scaled(g, weight) for g in grads]
        # Of n replicas each brings 1/n of the gradient but the whole weight of its examples.
        weight = ops.convert_to_tensor(1.0 if weight is None else weight, "float32")
        return grads, [weight / backend.num_replicas()]

    def update(self, grads: list, weight: Any) -> None:  # type: ignore[override] # told by in_replica
        first = ops.equal(self.micro_step, 0)
        present = [i for i, g in enumerate(grads) if g is not None]
        found = ops.convert_to_tensor([g is not None for g in grads])
        count = 1
        if self.nonfinite == "skip":
            finite = all_finite([backend.stored_values(grads[i]) for i in present])
            grads = [_where(finite, g) for g in grads]
            weight = ops.where(finite, weight, 0.0)
            count = ops.cast(finite, self.micro_step.dtype)
            self.skipped.assign_add(1 - count)
            found = ops.logical_and(found, finite)
        before = ops.logical_and(self.had_gradient, ops.logical_not(first))
        self.had_gradient.assign(ops.logical_or(before, found))
        # The sums are emptied before they are needed again, and the update only reads them:
        # so XLA neither copies them into a conditional nor writes them twice.
        self.when(first, self._clear_sums)
        backend.add_to([self.accumulators[i] for i in present], [grads[i] for i in present])
        self.weight_sum.assign_add(weight)
        self.micro_step.assign_add(count)
        # Of the others the state tells; one that was frozen in mid-cycle stays where it is.
        doubtful = [
            i
            for i, v in enumerate(self.inner_variables)
            if grads[i] is None and not self.is_frozen(v)
        ]
        self.when(self.micro_step >= self.accum_steps, lambda: self._update(present, doubtful))

    def _clear_sums(self) -> None:
        for accumulator in self.accumulators:
            _set_to_zero(accumulator)

    def _update(self, certain: list[int], doubtful: list[int]) -> None:
        """One step of the inner optimizer with the mean, then an empty cycle.

        Args:
            certain: places of the variables that are known to have a gradient.
            doubtful: places of those of which `had_gradient` tells when the step runs.
        """
        weight_sum = ops.convert_to_tensor(self.weight_sum)
        total = ops.where(weight_sum > 0, weight_sum, 1.0)
        variables = self.inner_variables

        def step(indices: list[int]) -> None:
            grads = [None] * len(variables)
            for i in indices:
                accumulator = self.accumulators[i]
                grads[i] = accumulator / ops.cast(total, accumulator.dtype)
            self.step_inner(grads)

        def step_of_all() -> None:
            with had_gradient({id(variables[i]): self.had_gradient[i] for i in doubtful}):
                step([*certain, *doubtful])

        if doubtful:
            had = [self.had_gradient[i] for i in doubtful]
            self.when(ops.any(ops.stack(had)), step_of_all, otherwise=lambda: step(certain))
        else:
            step(certain)
        self._start_cycle()

    def _start_cycle(self) -> None:
        _set_to_zero(self.weight_sum)
        _set_to_zero(self.micro_step)

    def end_of_fit(self, finish_inner: Any) -> None:
        """Settle an unfinished cycle as `remainder` says."""
        pending = int(ops.convert_to_numpy(self.micro_step))
        if pending and self.remainder == "apply":
            had = np.flatnonzero(ops.convert_to_numpy(self.had_gradient)).tolist()
            self._update([i for i in had if not self.is_frozen(self.inner_variables[i])], [])
        elif pending and self.remainder == "drop":
            self._start_cycle()
        finish_inner()
        if pending:
            done = {"apply": "applied as one update", "carry": "kept", "drop": "dropped"}
            warnings.warn(
                f"fit ended with {pending} of {self.accum_steps} micro-batches in the current "
                f"cycle: they were {done[self.remainder]} (remainder={self.remainder!r}).",
                stacklevel=3,  # the caller of finalize_variable_values
            )

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "accum_steps": self.accum_steps,
            "remainder": self.remainder,
            "nonfinite": self.nonfinite,
        }


def _set_to_zero(variable: keras.Variable) -> None:
    variable.assign(ops.zeros(variable.shape, variable.dtype))  # not 0 * NaN


def _scaled(grad: Any, weight: Any) -> Any:
    """weight * grad in float32; a micro-batch of weight 0 adds nothing, even if it is NaN."""
    if grad is None:
        return None

    def scale(g: Any) -> Any:
        dtype = at_least_float32(g.dtype)
        g = ops.cast(g, dtype)
        return ops.where(weight > 0, ops.cast(weight, dtype) * g, ops.zeros_like(g))

    return backend.map_values(scale, grad)


def _where(keep: Any, grad: Any) -> Any:
    if grad is None:
        return None
    return backend.map_values(lambda g: ops.where(keep, g, ops.zeros_like(g)), grad)
