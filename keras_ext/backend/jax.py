"""JAX: the branch of a traced conditional must be pure, so assignments are recorded."""

import math

import jax
import keras
import numpy as np
from jax import extend
from jax import numpy as jnp


def run_if(predicate, fn, otherwise=None):
    """See `keras_ext.backend`.

    Under tracing both functions run in a scope that records what they assign; the recorded
    values leave `jax.lax.cond` as outputs and are assigned outside.
    """
    if not isinstance(predicate, jax.core.Tracer):
        if predicate:
            fn()
        elif otherwise is not None:
            otherwise()
        return
    assigned = {}

    def recorded(branch):
        def run():
            scope = _RecordingScope()
            with scope:
                branch()
                assigned.update(scope.assigned)
                return [v.value for v in assigned.values()]

        return run

    if otherwise is None:  # traced second, when it is known what `fn` assigns
        unless = recorded(lambda: None)
    else:
        unless = recorded(otherwise)
        jax.eval_shape(unless)  # so that `fn` is known to leave what this one assigns
    values = jax.lax.cond(predicate, recorded(fn), unless)
    for variable, value in zip(assigned.values(), values, strict=True):
        variable.assign(value)


def add_to(variables, tensors, scale=1):
    for variable, tensor in zip(variables, tensors, strict=True):
        tensor, factor = (jnp.asarray(x, variable.dtype) for x in (tensor, scale))
        variable.assign(variable.value + factor * tensor)


def values(gradient):
    return gradient


def map_values(fn, gradient):
    return fn(gradient)


def densify(gradient):
    return gradient


def copies(variables):
    return [v.value for v in variables]  # arrays do not change


def apply_gradients(optimizer, grads, variables, after=(), whole=()):
    """See `keras_ext.backend`. `LossScaleOptimizer.apply` leaks tracers on JAX."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(grads, variables)
        return
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


def concrete(tensor):
    """See `keras_ext.backend`."""
    if isinstance(tensor, jax.core.Tracer):
        return None
    if isinstance(tensor, jax.Array):
        on_host = all(device.platform == "cpu" for device in tensor.devices())
        return np.asarray(tensor) if on_host and tensor.is_fully_addressable else None
    return np.asarray(tensor)


def value_and_grad(fn, has_aux=False):
    """See `keras_ext.backend`.

    What `fn` assigns (random seeds, moving averages) holds tracers, so it is recorded, leaves
    the transformation as an output, and is assigned outside.
    """

    def run(x, *args):
        assigned = []

        def pure(x):
            scope = _RecordingScope()
            with scope:
                out = fn(x, *args)
            assigned.extend(scope.assigned.values())
            values = [scope.state_mapping[id(v)] for v in assigned]
            return (out[0] if has_aux else out), (out, values)

        (_, (out, values)), grads = jax.value_and_grad(pure, has_aux=True)(
            keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        )
        for variable, value in zip(assigned, values, strict=True):
            variable.assign(value)
        return out, grads

    return run


class _RecordingScope(keras.StatelessScope):
    """Reads through to the scope outside of it, and remembers what was assigned."""

    def __init__(self):
        super().__init__(initialize_variables=False)
        self.assigned = {}

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        super().add_update(update)
        self.assigned[id(update[0])] = update[0]


def cond(predicate, true_fn, false_fn, inputs, variables, recompute=False):
    """See `keras_ext.backend`.

    What the branches assign is recorded under tracing, leaves `jax.lax.cond` as an output, and
    is assigned outside.
    """
    if not isinstance(predicate, jax.core.Tracer):
        return true_fn(inputs) if predicate else false_fn(inputs)
    assigned = {}

    def recorded(fn):
        def run():
            scope = _RecordingScope()
            with scope:
                out = fn(inputs)
                values = [v.value for v in variables]
            assigned.update(scope.assigned)
            return out, values

        return run

    out, values = jax.lax.cond(predicate, recorded(true_fn), recorded(false_fn))
    for variable, value in zip(variables, values, strict=True):
        if id(variable) in assigned:
            variable.assign(value)
    return out


def recompute(fn, tensors, variables):
    """See `keras_ext.backend`. The tensors are not arguments, as they have Keras masks."""
    assigned = {}

    @jax.checkpoint
    def run():
        scope = _RecordingScope()
        with scope:
            out = fn(*tensors)
            values = [v.value for v in variables]
        assigned.update(scope.assigned)
        return out, values

    out, values = run()
    for variable, value in zip(variables, values, strict=True):
        if id(variable) in assigned:
            variable.assign(value)
    return out


def product_flops(fn, specs):
    """See `keras_ext.backend`."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in specs]
    return _count(jax.make_jaxpr(fn)(*arguments).jaxpr)


def _count(jaxpr):
    flops = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            left = equation.invars[0].aval.shape
            (contracted, _), _ = parameters["dimension_numbers"]
            inner = math.prod(left[axis] for axis in contracted)
            flops += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            flops += 2 * math.prod(kernel) // out * math.prod(equation.outvars[0].aval.shape)
        else:  # programs within: of a scan as often as it turns
            inner = [_count(p) for p in extend.core.jaxprs_in_params(parameters)]
            branches = max if name == "cond" else sum
            flops += parameters.get("length", 1) * branches(inner) if inner else 0
    return flops


def compile(fn, variables, jit_compile=True):
    """See `keras_ext.backend`. The values are arguments, so that they can change."""

    @jax.jit
    def pure(values, *args):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return fn(*args)

    return lambda *args: pure([v.value for v in variables], *args)


def adopt(array):
    """See `keras_ext.backend`."""
    return jax.device_put(array, may_alias=True)
