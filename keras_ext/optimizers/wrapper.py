"""What optimizer wrappers share: they own an inner optimizer and speak for it."""

import keras

from keras_ext import backend

# Keras optimizers that compute the weights from their state, which follows the weights.
FOLLOWERS = tuple(
    getattr(keras.optimizers, name)
    for name in ("Ftrl", "ScheduleFreeAdamW")
    if hasattr(keras.optimizers, name)
)


# A trainable scalar of this name carries the weight of the batch as its gradient: on JAX an
# optimizer sees nothing else of a batch. See keras_ext.training.BatchWeightModel.
BATCH_WEIGHT = "accum_batch_weight"


class OptimizerWrapper(keras.optimizers.Optimizer):
    """Base of optimizers that wrap another one, by composition.

    Learning rate, iteration count, loss scaling and end-of-training hooks are the inner
    optimizer's, so schedules and callbacks see real updates. The attribute is called
    `inner_optimizer`, as in `keras.optimizers.LossScaleOptimizer`: `SwapEMAWeights` and
    `TensorBoard` look for that name.

    A subclass creates its own variables in `build` (then calls `super().build`), and
    defines `apply`, which calls `align` first.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        name: name of the wrapper; default, the class name in snake case.

    Private names of `keras.optimizers.Optimizer` are used in this class only:
    `_variables` (what this object itself created), `_trainable_variables` (what it was
    built for), `_get_variable_index` and `_check_variables_are_known`.
    """

    # Whether the state follows the weights (slow weights, averages, factors), so that nothing
    # else may move them in between.
    tracks_weights = False

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None):
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = keras.optimizers.get(optimizer)

    def inner_optimizers(self) -> list:
        """The chain of optimizers inside, outermost first."""
        chain, inner = [], self.inner_optimizer
        while inner is not None:
            chain.append(inner)
            inner = getattr(inner, "inner_optimizer", None)
        return chain

    def build(self, variables):
        super().build(variables)
        self.inner_optimizer.build(self.inner_variables)

    @property
    def inner_variables(self) -> list:
        """The model variables that the inner optimizer updates."""
        return list(self._trainable_variables)

    @property
    def own_variables(self) -> list:
        """The state of this wrapper alone."""
        return list(self._variables)

    @property
    def variables(self) -> list:
        """The whole state. The JAX trainer threads exactly this list through its steps."""
        return self.own_variables + self.inner_optimizer.variables

    def align(self, grads, trainable_variables=None) -> list:
        """Build if needed; return one gradient, or None, for every variable built for."""
        grads = list(grads)
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    f"{type(self).__name__} is not built yet. Pass trainable_variables, or "
                    "call build(trainable_variables) first."
                )
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        if len(grads) != len(trainable_variables):
            raise ValueError(
                f"grads has {len(grads)} entries for {len(trainable_variables)} variables. "
                "Pass one gradient, or None, per variable."
            )
        if not self.built:
            self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)
        aligned = [None] * len(self._trainable_variables)
        for grad, variable in zip(grads, trainable_variables, strict=True):
            aligned[self._get_variable_index(variable)] = grad
        return aligned

    def apply_inner(self, grads, after=()):
        """One step of the inner optimizer, outside of the replicas; see `merge_replicas`.

        Args:
            grads: one gradient, or None, for every one of `inner_variables`.
            after: tensors read of the variables that must hold the values before the step.
        """
        # An AccumOptimizer inside takes the weight of a batch for that of each replica.
        backend.apply_gradients(
            self.inner_optimizer, grads, self.inner_variables, after, everywhere=[BATCH_WEIGHT]
        )

    def add_sum_variable(self, like, name):
        """A variable for sums over steps: in float32 at least, whatever `like` is."""
        return self.add_variable(
            like.shape,
            dtype="float64" if like.dtype == "float64" else "float32",
            layout=getattr(like, "_layout", None),  # sharded like the weight it is for
            name=f"{like.path.replace('/', '_')}_{name}",
        )

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """Number of real updates."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        # Keras's constructor sets it before there is an inner optimizer, and
        # LossScaleOptimizer sets it to None on the optimizer that it wraps.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        known = {id(v) for v in self.inner_variables}
        self.inner_optimizer.finalize_variable_values([v for v in var_list if id(v) in known])

    def set_weights(self, weights):
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store):
        # The inner optimizer is saved as an object of its own; Keras's wrappers, which
        # store `self.variables` here, write its state twice.
        for i, variable in enumerate(self.own_variables):
            store[str(i)] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        own = self.own_variables
        if len(store.keys()) != len(own):
            raise ValueError(
                f"{type(self).__name__} {self.name!r} has {len(own)} variables of its own, the "
                f"file holds {len(store.keys())}. Load it with the optimizer and options it "
                "was saved with, built for the same model."
            )
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])

    def get_config(self):
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)  # Keras hands out a shared dictionary
        optimizer = keras.saving.deserialize_keras_object(
            config.pop("optimizer"), custom_objects=custom_objects
        )
        return cls(optimizer, **config)


class UpdateWrapper(OptimizerWrapper):
    """Base of wrappers that change the step of the inner optimizer, variable by variable.

        w <- rewrite(w, w'),    w' = where the inner optimizer goes from w

    What acts inside (clipping, weight decay, momentum) acts before; constraints are applied
    once more afterwards. Where the inner optimizer waits, w' = w and nothing moves. On
    TensorFlow the inner optimizer gets the gradients of repeated tokens summed. A subclass
    defines `rewrite`, and `rewrites` if it leaves some variables alone.

    Raises:
        ValueError: something inside follows the weights (a moving average, slow weights,
            factors) and would follow w' instead of the weights.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None):
        super().__init__(optimizer, name=name)
        for inner in self.inner_optimizers():
            if inner.use_ema or getattr(inner, "tracks_weights", isinstance(inner, FOLLOWERS)):
                what = "use_ema=True" if inner.use_ema else type(inner).__name__
                raise ValueError(
                    f"{type(self).__name__} changes the steps that {what} of {inner.name!r} "
                    "keeps account of. Put it inside: the wrapper that follows the weights "
                    "goes outside (for use_ema, EMAOptimizer)."
                )

    def rewrites(self, index: int) -> bool:
        """Whether the steps of variable `index` are changed at all."""
        return True

    def constrains(self, index: int) -> bool:
        """Whether the constraint of variable `index` is applied to what `rewrite` returns."""
        return True

    def before_step(self):
        """What `rewrite` has to know from before the inner step."""
        return ()

    def rewrite(self, index: int, old, new, grad, before):
        """The new value of variable `index`.

        Args:
            index: which variable.
            old: w, in float32 (float64) whatever the variable is.
            new: w', likewise.
            grad: the gradient as one tensor, None if there is none.
            before: what `before_step` returned.
        """
        raise NotImplementedError

    def apply(self, grads, trainable_variables=None):
        backend.merge_replicas(self._apply, self.align(grads, trainable_variables))

    def _apply(self, grads):
        variables = self.inner_variables
        grads = [None if g is None else backend.densify(g) for g in grads]
        chosen = [
            i
            for i, v in enumerate(variables)
            if self.rewrites(i) and not getattr(v, "overwrite_with_gradient", False)
        ]
        old = backend.copies([variables[i] for i in chosen])
        before = self.before_step()
        updates = self.iterations + 0  # the number, not the variable
        read = [*old, updates, *keras.tree.flatten(before)]
        self.apply_inner(grads, after=read)
        updated = self.iterations > updates
        for i, w in zip(chosen, old, strict=True):
            variable = variables[i]
            new = keras.ops.stop_gradient(variable.value)
            value = self.rewrite(
                i, _at_least_float32(w), _at_least_float32(new), grads[i], before
            )
            variable.assign(value)
            if variable.constraint is not None and self.constrains(i):
                value = variable.constraint(variable)  # none while the inner optimizer waits
                variable.assign(keras.ops.where(updated, value, variable.value))


def _at_least_float32(tensor):
    return keras.ops.cast(tensor, keras.backend.result_type(tensor.dtype, "float32"))
