"""Base of optimizer wrappers: they own an inner optimizer and speak for it."""

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers import nesting
from keras_ext.optimizers.base import BaseOptimizer, carries_batch_weight, is_overwritten

# While an AccumOptimizer updates: id of a weight -> a boolean tensor, whether the weight had a
# gradient in the cycle. Only weights of which no trace knows it are in here.
_HAD_GRADIENT: contextvars.ContextVar[Mapping[int, Any]] = contextvars.ContextVar(
    "had_gradient", default=MappingProxyType({})
)


# Before 3.11 a LossScaleOptimizer does nothing to what it wraps, so a wrapper does not learn of
# one outside, and refuses one inside under the policy mixed_float16 when it is created.
KERAS_SAYS_NOTHING = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 11)


@contextlib.contextmanager
def had_gradient(flags: Mapping[int, Any]) -> Iterator[None]:
    """Tell the optimizers inside which gradients may be zeros in the place of None.

    Args:
        flags: id of a weight -> whether it had a gradient, as a boolean tensor.
    """
    token = _HAD_GRADIENT.set({**_HAD_GRADIENT.get(), **flags})
    try:
        yield
    finally:
        _HAD_GRADIENT.reset(token)


def in_doubt(variable: Any) -> Any:
    """The tensor that says whether a weight had a gradient; None if it is known before."""
    return _HAD_GRADIENT.get().get(id(variable))


class OptimizerWrapper(BaseOptimizer):
    """Base of optimizers that wrap another one, by composition.

    A subclass writes `update(grads)`, which calls `step_inner(grads)` for a step of the inner
    optimizer. What `update` gets is ready for any arithmetic: one tensor per variable of
    `inner_variables`, or None where there is no gradient, summed over replicas and over
    repeated tokens, once per call of `apply`. It also gets what only poses as a gradient (see
    `is_gradient`) and has to hand it on as it is.

        step_inner(grads)       a step of the inner optimizer; whether it updated the weights
        when(predicate, fn)     fn() if the predicate holds, as in `when(updated, fn)`
        end_of_fit(finish)      override for what is left to do when `fit` ends
        add_variable(shape, dtype=, name=), add_sum_variable(like, name)
                                state, to be created in `build`, which calls `super().build`
        follows_weights         class attribute: True if the state is computed from the weights

    Learning rate, iteration count, loss scaling, exclusions from weight decay and the end of
    training are the inner optimizer's, so schedules and callbacks see real updates. The
    attribute is called `inner_optimizer`, as in `keras.optimizers.LossScaleOptimizer`:
    `SwapEMAWeights` and `TensorBoard` look for that name. The whole state, with that of the
    inner optimizers, is saved in one place, so it is loaded whole or, with Keras's warning,
    not at all.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        name: name of the wrapper; default, the class name in snake case.

    Raises:
        ValueError: in `compile` under the policy mixed_float16, if a `LossScaleOptimizer` is
            inside, because Keras puts another one outside.

    Example:
        Gradient centralisation (arXiv 2004.01461) takes the mean over its inputs out of the
        gradient of every unit. The whole wrapper:

        >>> class CentralizeOptimizer(OptimizerWrapper):
        ...     def update(self, grads):
        ...         self.step_inner([self.centralized(i, g) for i, g in enumerate(grads)])
        ...
        ...     def centralized(self, index, grad):
        ...         if grad is None or not self.is_gradient(index) or len(grad.shape) < 2:
        ...             return grad
        ...         axes = tuple(range(len(grad.shape) - 1))
        ...         return grad - keras.ops.mean(grad, axis=axes, keepdims=True)
        >>> model.compile(CentralizeOptimizer(keras.optimizers.Adam(1e-3)), loss="mse")
        >>> history = model.fit(x, y, verbose=0)
    """

    # Names of the attributes that hold optimizers.
    branch_names: tuple[str, ...] = ("inner_optimizer",)
    # Whether the state follows the weights (slow weights, averages, factors), so that nothing
    # else may move them in between.
    follows_weights = False

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None):
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = keras.optimizers.get(optimizer)
        if KERAS_SAYS_NOTHING and keras.config.dtype_policy().compute_dtype == "float16":
            self._refuse_scale_inside()

    def __dir__(self) -> list[str]:
        # Keras saves every optimizer that `dir` names as an object of its own.
        return [name for name in super().__dir__() if name not in self.branch_names]

    def build(self, variables: list) -> None:
        super().build(variables)
        self.inner_optimizer.build(self.inner_variables)

    @property
    def inner_variables(self) -> list:
        """The variables that the inner optimizer updates."""
        return self.model_variables

    @property
    def variables(self) -> list:
        """The whole state. The JAX trainer threads exactly this list through its steps."""
        inner = [v for branch in nesting.branches(self) for v in branch.variables]
        return self.own_variables + inner

    def is_gradient(self, index: int) -> bool:
        """Whether what comes for variable `index` is a gradient, and no value in its place.

        No gradients: the weight of the batch, and the scales of float8 training.
        """
        variable = self.inner_variables[index]
        return not (carries_batch_weight(variable) or is_overwritten(variable))

    def step_inner(self, grads: list, after: Any = ()) -> Any:
        """One step of the inner optimizer.

        Args:
            grads: one gradient, or None, for every one of `inner_variables`.
            after: tensors read of variables before, which must hold the values before the step.

        Returns: whether the weights were updated, as a boolean tensor: not if the inner
            optimizer accumulates, or skips a step.
        """
        updates = self.iterations + 0  # the number, not the variable
        self.step_branch(self.inner_optimizer, grads, self.inner_variables, [*after, updates])
        return self.iterations > updates

    def step_branch(
        self, optimizer: Any, grads: list, variables: list, after: Any = ()
    ) -> None:
        """One step of an optimizer inside; nothing if all of its variables have no gradient."""
        pairs = zip(grads, variables, strict=True)
        if all(g is None or carries_batch_weight(v) for g, v in pairs):
            return
        kept = [
            (state, in_doubt(v))
            for v in variables
            if in_doubt(v) is not None
            for state in _state(optimizer, v)
        ]
        old = backend.snapshot([state for state, _ in kept])
        # Two of Keras's wrappers want all gradients; who else is told of no gradient warns.
        if not isinstance(optimizer, (keras.optimizers.LossScaleOptimizer, nesting.MULTI)):
            given = [i for i, g in enumerate(grads) if g is not None]
            grads, variables = [grads[i] for i in given], [variables[i] for i in given]
        # An AccumOptimizer inside takes the weight of a batch for that of each replica.
        whole = [carries_batch_weight(v) for v in variables]
        backend.apply_gradients(optimizer, grads, variables, [*after, *old], whole)
        for (state, flag), value in zip(kept, old, strict=True):
            state.assign(ops.where(flag, state.value, value))

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """Number of real updates."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self) -> Any:
        return self.inner_optimizer.loss_scale_factor

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "loss_scale_factor":
            super().__setattr__(name, value)
            return
        # A property would not do: on TensorFlow, Keras does not set what is the same already.
        # A LossScaleOptimizer sets None on the optimizer that it wraps. (Keras's constructor
        # sets it as well, before there is an inner optimizer.)
        self._refuse_scale_inside()
        for branch in nesting.branches(self):
            branch.loss_scale_factor = value

    def _refuse_scale_inside(self) -> None:
        kind = type(self).__name__
        nesting.refuse(
            self,
            nesting.scales_loss,
            "the loss would be scaled twice: {kind} {name!r} is inside of {wrapper} already. "
            f"Put it outside, LossScaleOptimizer({kind}(...)), as compile does by itself under "
            "the policy mixed_float16; or compile with auto_scale_loss=False.",
        )

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the weight decay of all optimizers inside."""
        for inner in nesting.chain(self):
            if not nesting.branches(inner):
                inner.exclude_from_weight_decay(var_list, var_names)

    def decays(self, variable: Any) -> bool:
        return any(
            inner._use_weight_decay(variable)
            for inner in nesting.chain(self)
            if not nesting.branches(inner)
        )

    def _finish_inner(self, var_list: Any) -> bool:
        updates = int(ops.convert_to_numpy(self.iterations))
        self.finish_branch(self.inner_optimizer, self.inner_variables, var_list)
        return int(ops.convert_to_numpy(self.iterations)) != updates

    def finish_branch(self, optimizer: Any, variables: list, var_list: Any) -> None:
        known = {id(v) for v in variables}
        optimizer.finalize_variable_values([v for v in var_list if id(v) in known])

    def set_weights(self, weights: Any) -> None:
        variables, weights = self.variables, list(weights)
        shapes = [tuple(v.shape) for v in variables], [tuple(w.shape) for w in weights]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"weights must have the shapes of the state of {self.name!r}, "
                f"{shapes[0]}, got {shapes[1]}."
            )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)

    def _kind(self) -> str:
        wrappers = [o for o in nesting.chain(self) if isinstance(o, OptimizerWrapper)]
        return "+".join(type(o).__name__ for o in wrappers)

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(self.variables):
            store[str(i)] = ops.convert_to_numpy(variable)
        store[self._kind()] = 0  # so that the state of one wrapper is not taken for another's

    def load_own_variables(self, store: Any) -> None:
        variables = self.variables
        numbers = [str(i) for i in range(len(variables))]
        reason = None
        if set(store.keys()) != {*numbers, self._kind()}:
            kinds = [key for key in store.keys() if not key.isdigit()]  # noqa: SIM118
            reason = (
                f"it has {len(variables)} variables whereas the saved optimizer has "
                f"{len(store.keys()) - len(kinds)}, of {' '.join(kinds) or 'another class'}"
            )
        elif wrong := [
            i
            for i, v in zip(numbers, variables, strict=True)
            if tuple(store[i].shape) != tuple(v.shape)
        ]:
            i = wrong[0]
            reason = (
                f"its variable {variables[int(i)].path} has the shape "
                f"{variables[int(i)].shape} whereas the saved one has {store[i].shape}"
            )
        if reason is not None:  # as Keras does
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}, because {reason}. The "
                "optimizer keeps the state it has. (An optimizer that is not built yet has no "
                "place for a saved state: call build(model.trainable_variables) before.)",
                stacklevel=2,
            )
            return
        for i, variable in zip(numbers, variables, strict=True):
            variable.assign(store[i])

    def get_config(self) -> dict[str, Any]:
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)  # Keras hands out a shared dictionary
        optimizer = keras.saving.deserialize_keras_object(
            config.pop("optimizer"), custom_objects=custom_objects
        )
        return cls(optimizer, **config)


def _state(optimizer: Any, weight: keras.Variable) -> list:
    """The weight, and what an optimizer of Keras or those inside of it keep for this weight.

    Optimizers keep lists with an entry for every variable that they were built for, as the
    documentation of Keras tells them to. Ours know by `in_doubt` what to leave alone.
    """
    if isinstance(optimizer, BaseOptimizer):
        return []
    inner = nesting.branches(optimizer)
    if inner:
        return [state for branch in inner for state in _state(branch, weight)]
    known = [id(v) for v in optimizer._trainable_variables]
    if id(weight) not in known:
        return []
    slots = [
        value
        for name, value in vars(optimizer).items()
        if name not in ("_variables", "_trainable_variables")
        and isinstance(value, (list, tuple))
        and len(value) == len(known)
        and all(item is None or isinstance(item, keras.Variable) for item in value)
    ]
    listed = {id(v) for slot in slots for v in slot}
    strange = [v.path for v in optimizer.variables if len(v.shape) and id(v) not in listed]
    if strange or optimizer.use_ema:
        reason = f"its state {strange[0]} belongs to no weight" if strange else "use_ema=True"
        raise ValueError(
            f"{weight.path} has a gradient in some steps of an accumulation only, when these "
            f"are compiled, and {type(optimizer).__name__} {optimizer.name!r} cannot leave it "
            f"out: {reason}. Give it a gradient in every step"
            + ("." if strange else ", or put EMAOptimizer outside instead.")
        )
    index = known.index(id(weight))
    return [weight, *(slot[index] for slot in slots if slot[index] is not None)]
