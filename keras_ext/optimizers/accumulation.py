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
see real updates only. Cost: one float32 buffer of the size of the weights, and one addition
per micro-batch; the inner update does not run between updates.

Source: kexue.fm/archives/6794.
"""

import warnings

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.wrapper import BATCH_WEIGHT, OptimizerWrapper

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

    Unequal micro-batches: in a step of your own pass `apply(grads, variables, weight=n)` or
    `stateless_apply(..., weight=n)`; in `fit`, build the model with
    `keras_ext.training.BatchWeightModel`. A cycle whose weights sum to zero has a zero
    gradient.

    Under `tf.distribute.MirroredStrategy` the gradients are summed over the replicas at every
    micro-batch, and clipping inside sees their sum (the weight of a micro-batch may differ
    by replica). There `LossScaleOptimizer` goes outside.

    Example:
        >>> optimizer = AccumOptimizer(keras.optimizers.Adam(1e-3), accum_steps=4)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # updates as with 32

    Reference: kexue.fm/archives/6794.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        accum_steps: int,
        remainder: str = "apply",
        nonfinite: str = "propagate",
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        if isinstance(accum_steps, bool) or not isinstance(accum_steps, int) or accum_steps < 1:
            raise ValueError(f"accum_steps must be an integer >= 1, got {accum_steps!r}.")
        if remainder not in REMAINDERS:
            raise ValueError(f"remainder must be one of {REMAINDERS}, got {remainder!r}.")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}.")
        self._check_inner(nonfinite)
        self.accum_steps = accum_steps
        self.remainder = remainder
        self.nonfinite = nonfinite

    def _check_inner(self, nonfinite):
        for inner in self.inner_optimizers():
            if isinstance(inner, AccumOptimizer) or inner.gradient_accumulation_steps:
                raise ValueError(
                    f"optimizer {inner.name!r} already accumulates gradients. Set the number "
                    "of steps in one place: AccumOptimizer(optimizer, accum_steps)."
                )
            if nonfinite == "skip" and isinstance(inner, keras.optimizers.LossScaleOptimizer):
                raise ValueError(
                    'nonfinite="skip" keeps overflows from the LossScaleOptimizer inside, '
                    "whose scale could then never fall. Put the LossScaleOptimizer outside, "
                    'or use nonfinite="propagate".'
                )

    def build(self, variables):
        self.micro_step = self.add_variable((), dtype="int", name="micro_step")
        self.weight_sum = self.add_variable((), dtype="float32", name="weight_sum")
        self.skipped = self.add_variable((), dtype="int", name="skipped")
        super().build(variables)
        self.accumulators = [self._add_accumulator(v) for v in self.inner_variables]
        # Variables that never had a gradient are passed on as such: no decay, no momentum.
        self._never_had_gradient = None

    def _add_accumulator(self, variable):
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{variable.path} takes its gradient as its value (float8 training): a mean of "
                "gradients has no meaning there. Train it without AccumOptimizer."
            )
        return self.add_sum_variable(variable, "accumulator")

    @property
    def inner_variables(self):
        return [v for v in super().inner_variables if v.name != BATCH_WEIGHT]

    def apply(self, grads, trainable_variables=None, weight=None):
        """Take in one micro-batch; every `accum_steps` of them, update.

        Args:
            grads: one gradient, or None, per variable.
            trainable_variables: the variables; not needed once the optimizer is built.
            weight: scalar w_i >= 0 of this micro-batch, in any unit; default 1.
        """
        pairs = list(
            zip(self.align(grads, trainable_variables), self._trainable_variables, strict=True)
        )
        grads = [g for g, v in pairs if v.name != BATCH_WEIGHT]
        if weight is None:
            weight = next((g for g, v in pairs if v.name == BATCH_WEIGHT), None)
        if weight is not None:
            weight = ops.cast(weight, "float32")
            grads = [_scaled(g, weight) for g in grads]
        # Of n replicas each brings 1/n of the gradient but the whole weight of its examples.
        weight = ops.convert_to_tensor(1.0 if weight is None else weight, "float32")
        share = weight / backend.num_replicas()
        backend.merge_replicas(self._accumulate, grads, share)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables, weight=None):
        """`apply` as a pure function, for steps written in JAX.

        Returns: the new values of the trainable variables and of `self.variables`.
        """
        if weight is None or keras.backend.backend() == "tensorflow":  # where Keras refuses it
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        variables = self._trainable_variables + self.variables
        values = [*trainable_variables, *optimizer_variables]
        scope = keras.StatelessScope(list(zip(variables, values, strict=True)))
        with scope:
            self.apply(grads, weight=weight)
        values = [scope.get_current_value(v) for v in variables]
        count = len(self._trainable_variables)
        return values[:count], values[count:]

    def _accumulate(self, grads, weight):
        count = 1
        if self.nonfinite == "skip":
            finite = _all_finite(grads)
            grads = [_where(finite, g) for g in grads]
            weight = ops.where(finite, weight, 0.0)
            count = ops.cast(finite, self.micro_step.dtype)
            self.skipped.assign_add(1 - count)
        absent = {i for i, g in enumerate(grads) if g is None}
        present = [i for i in range(len(grads)) if i not in absent]
        seen_before = self._never_had_gradient
        self._never_had_gradient = absent if seen_before is None else seen_before & absent
        # The sums are emptied before they are needed again, and the update only reads them:
        # so XLA neither copies them into a conditional nor writes them twice.
        backend.run_if(
            ops.equal(self.micro_step, 0), self._clear_sums, variables=self.accumulators
        )
        backend.add_to([self.accumulators[i] for i in present], [grads[i] for i in present])
        self.weight_sum.assign_add(weight)
        self.micro_step.assign_add(count)
        backend.run_if(
            self.micro_step >= self.accum_steps,
            self._update,
            variables=self.inner_variables + self.variables,
        )

    def _clear_sums(self):
        for accumulator in self.accumulators:
            _set_to_zero(accumulator)

    def _update(self):
        """One step of the inner optimizer with the mean, then an empty cycle."""
        weight_sum = ops.convert_to_tensor(self.weight_sum)
        total = ops.where(weight_sum > 0, weight_sum, 1.0)
        absent = self._never_had_gradient or ()
        mean = [
            None if i in absent else acc / ops.cast(total, acc.dtype)
            for i, acc in enumerate(self.accumulators)
        ]
        self.apply_inner(mean)
        self._start_cycle()

    def _start_cycle(self):
        _set_to_zero(self.weight_sum)
        _set_to_zero(self.micro_step)

    def finalize_variable_values(self, var_list):
        """End of `fit`: settle an unfinished cycle as `remainder` says."""
        if not self.built or not backend.has_value(self.micro_step):
            return  # fit failed before or in its first step: let its own error be seen
        pending = int(ops.convert_to_numpy(self.micro_step))
        if pending and self.remainder == "apply":
            self._update()
        elif pending and self.remainder == "drop":
            self._start_cycle()
        super().finalize_variable_values(var_list)
        if pending:
            done = {"apply": "applied as one update", "carry": "kept", "drop": "dropped"}
            warnings.warn(
                f"fit ended with {pending} of {self.accum_steps} micro-batches in the current "
                f"cycle: they were {done[self.remainder]} (remainder={self.remainder!r}).",
                stacklevel=2,
            )

    def get_config(self):
        return super().get_config() | {
            "accum_steps": self.accum_steps,
            "remainder": self.remainder,
            "nonfinite": self.nonfinite,
        }


def _set_to_zero(variable):
    variable.assign(ops.zeros(variable.shape, variable.dtype))  # not 0 * NaN


def _scaled(grad, weight):
    """weight * grad in float32; a micro-batch of weight 0 adds nothing, even if it is NaN."""
    if grad is None:
        return None

    def scale(g):
        dtype = (
            "float64" if keras.backend.standardize_dtype(g.dtype) == "float64" else "float32"
        )
        g = ops.cast(g, dtype)
        return ops.where(weight > 0, ops.cast(weight, dtype) * g, ops.zeros_like(g))

    return backend.map_values(scale, grad)


def _where(keep, grad):
    if grad is None:
        return None
    return backend.map_values(lambda g: ops.where(keep, g, ops.zeros_like(g)), grad)


def _all_finite(grads):
    checks = [ops.all(ops.isfinite(backend.values(g))) for g in grads if g is not None]
    return ops.all(ops.stack(checks))
