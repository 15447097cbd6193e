"""JAX: branches of a traced conditional must be pure, so assignments are recorded."""

import jax
import keras
from jax import numpy as jnp


def cond(predicate, true_fn, false_fn, variables):
    """Run `true_fn()` or `false_fn()`, whose assignments go to `variables` only.

    Under tracing each branch runs in a scope that records what it assigns; the
    recorded values leave `jax.lax.cond` as outputs and are assigned outside. Every
    variable that a branch reads or writes has to be listed: an unlisted one would be
    read from its stale eager value.
    """
    if not isinstance(predicate, jax.core.Tracer):
        (true_fn if predicate else false_fn)()
        return

    def recorded(fn):
        def run(values):
            scope = keras.StatelessScope(list(zip(variables, values, strict=True)))
            with scope:
                fn()
            return [scope.get_current_value(v) for v in variables]

        return run

    before = [v.value for v in variables]
    after = jax.lax.cond(predicate, recorded(true_fn), recorded(false_fn), before)
    for variable, value in zip(variables, after, strict=True):
        variable.assign(value)


def add_to(variables, tensors):
    for variable, tensor in zip(variables, tensors, strict=True):
        variable.assign(variable.value + jnp.asarray(tensor, variable.dtype))


def values(gradient):
    return gradient


def map_values(fn, gradient):
    return fn(gradient)


def densify(gradient):
    return gradient


def copies(variables):
    return [v.value for v in variables]  # arrays do not change


def apply_gradients(optimizer, grads, variables, after=()):
    """Update through `stateless_apply`: `LossScaleOptimizer.apply` leaks tracers on JAX."""
    new_variables, new_state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for variable, value in zip(variables, new_variables, strict=True):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, new_state, strict=True):
        variable.assign(value)


def merge_replicas(fn, grads, *scalars):
    """Nothing to merge: a JAX array is global, its gradient already covers all devices."""
    fn(grads, *scalars)


def num_replicas():
    return 1


def has_value(variable):
    """Whether the variable can be read.

    The JAX trainer empties the variables before a step and fills them after the epoch. When
    a step raises, it still ends `fit` the ordinary way, on empty or donated variables.
    """
    value = variable._value  # private: `value` would initialise an empty variable anew
    return value is not None and not value.is_deleted()
