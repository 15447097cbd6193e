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

import re
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


class _Moment(NamedTuple):
    """A moment of all weights: it decays once per cycle and takes in `share` g (or g^2)."""

    variables: list
    decay: float
    share: float
    squared: bool = False

    def term(self, grad):
        """What a gradient adds. A sum of repeated rows is squared, not the rows."""

        def scaled(g):
            # A Python number keeps its digits beside float64.
            share = self.share
            share = share if isinstance(share, float) else ops.cast(share, g.dtype)
            return share * (g * g if self.squared else g)

        return backend.map_values(scaled, backend.densify(grad) if self.squared else grad)


class _MomentumAccumulation(keras.optimizers.Optimizer):
    """The cycle of micro-batches. A subclass says what moments there are, and what a step is.

    Private names of Keras: `_trainable_variables`, `_use_weight_decay` (the answer to
    `exclude_from_weight_decay`), `_filter_empty_gradients` (its warning), those of `align`.
    """

    slots = ("momentums",)
    align = OptimizerWrapper.align

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

    def moments(self) -> list[_Moment]:
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
        return self.add_variable(
            variable.shape,
            dtype="float64" if variable.dtype == "float64" else "float32",
            layout=getattr(variable, "_layout", None),  # sharded like the weight it is for
            name=f"{variable.path.replace('/', '_')}_{name}",
        )

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

        backend.cond(
            ops.equal(self.micro_step, 0),
            decay,
            _nothing,
            variables=[m for moment in moments for m in moment.variables],
        )
        for moment in moments:
            terms = [moment.term(g) for g in present.values()]
            backend.add_to([moment.variables[i] for i in present], terms)
        self.micro_step.assign_add(1)
        last = self.micro_step >= self.accum_steps
        any_bad = False if finite is None else ops.logical_not(ops.all(ops.stack(finite)))
        backend.cond(
            ops.logical_or(last, any_bad),
            lambda: self._update(last, finite),
            _nothing,
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


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumSGD(_MomentumAccumulation):
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
        learning_rate,
        momentum: float,
        accum_steps: int,
        weight_decay: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        if not 0 < momentum < 1:
            raise ValueError(
                f"momentum must be between 0 and 1, got {momentum!r}. Without momentum there "
                "is nothing to accumulate in: use AccumOptimizer(SGD(...), accum_steps)."
            )
        self.momentum = momentum

    def moments(self):
        share = -self.learning_rate / self.accum_steps
        return [_Moment(self.momentums, self.momentum, share)]

    def step(self, index, weight, rate, count):
        return self._decayed(index, weight, rate) + self.momentums[index].value

    def get_config(self):
        return super().get_config() | {"momentum": self.momentum}


@keras.saving.register_keras_serializable(package="keras_ext")
class MomentumAccumAdam(_MomentumAccumulation):
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
        learning_rate,
        accum_steps: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        self.beta_1 = _decay("beta_1", beta_1)
        self.beta_2 = _decay("beta_2", beta_2)
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon!r}.")
        self.epsilon = epsilon

    def moments(self):
        b1, b2, k = self.beta_1, self.beta_2, self.accum_steps
        return [
            _Moment(self.momentums, b1, (1 - b1) / k),
            _Moment(self.velocities, b2, (1 - b2) / k, squared=True),
        ]

    def step(self, index, weight, rate, count):
        m, v = self.momentums[index].value, self.velocities[index].value
        alpha = rate * ops.sqrt(1 - self.beta_2**count) / (1 - self.beta_1**count)
        return self._decayed(index, weight, rate) - alpha * m / (ops.sqrt(v) + self.epsilon)

    def get_config(self):
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
        learning_rate,
        accum_steps: int,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused,
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

    def step(self, index, weight, rate, count):
        m, v = self.momentums[index].value, self.velocities[index].value
        m, v = m / (1 - self.beta_1**count), v / (1 - self.beta_2**count)
        weight = self._decayed(index, weight, rate)
        update = m / (ops.sqrt(v) + self.epsilon)
        size, length = _norm(weight), _norm(update)
        ratio = ops.where((size > 0) & (length > 0), size / length, 1.0)
        return weight - ratio * rate * update


@keras.saving.register_keras_serializable(package="keras_ext")
class Tiger(_MomentumAccumulation):
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
        learning_rate=1e-3,
        accum_steps: int = 1,
        beta: float = 0.965,
        weight_decay: float | None = 0.01,
        shrink: float = 0.99,
        loss_scale_factor: float | None = None,
        name: str | None = None,
        **refused,
    ):
        super().__init__(
            learning_rate, accum_steps, weight_decay, loss_scale_factor, name, refused
        )
        self.beta = _decay("beta", beta)
        if not 0 < shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], got {shrink!r}.")
        self.shrink = shrink

    def moments(self):
        return [_Moment(self.momentums, self.beta, (1 - self.beta) / self.accum_steps)]

    def step(self, index, weight, rate, count):
        variable = self._trainable_variables[index]
        decay = self.weight_decay or 0.0
        if len(variable.shape) < 2 or re.search("bias|beta|gamma|scale", variable.name):
            rate, decay = rate / 2, 0.0
        elif "embeddings" in variable.name:
            rate = rate * _rms(weight, axis=-1)
        else:
            rate = rate * _rms(weight)
        if not self._use_weight_decay(variable):
            decay = 0.0
        return weight - rate * (ops.sign(self.momentums[index].value) + decay * weight)

    def recover(self, index, weight):
        center = 1.0 if re.search("gamma|scale", self._trainable_variables[index].name) else 0.0
        return center + self.shrink * (weight - center)

    def _take(self, grads):
        finite = [
            ops.convert_to_tensor(True)
            if g is None
            else ops.all(ops.isfinite(backend.values(g)))
            for g in grads
        ]
        grads = [
            None if g is None else _where(ok, g) for ok, g in zip(finite, grads, strict=True)
        ]
        super()._take(grads, finite)

    def get_config(self):
        return super().get_config() | {"beta": self.beta, "shrink": self.shrink}


def _decay(name, value):
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")
    return value


def _nothing():
    pass


def _where(keep, grad):
    return backend.map_values(lambda g: ops.where(keep, g, ops.zeros_like(g)), grad)


def _norm(x):
    return ops.sqrt(ops.sum(x * x))


def _rms(x, axis=None):
    return ops.sqrt(ops.mean(x * x, axis=axis, keepdims=True))
