"""JAX: what is traced must be pure, so assignments are recorded and carried out outside."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax import extend
from jax import numpy as jnp

from keras_ext.backend import scope
from keras_ext.backend.scope import substitute, values_after  # noqa: F401 # part of the seam


class _Pure:
    """Calls of functions in a recording scope: its findings leave a transformation as outputs.

    The variables that one call assigned are outputs of all later ones, so that the branches of
    a conditional, or the turns of a loop, return the same.
    """

    def __init__(self) -> None:
        self.assigned: dict[int, keras.Variable] = {}
        self.layers: list[keras.Layer] = []

    def call(
        self, fn: Callable, *args: Any, state: Sequence[Any] = ()
    ) -> tuple[Any, list[Any], list[Any]]:
        """What `fn` returns, the values it leaves, the losses it adds; `state` was before."""
        variables = self.variables if state else []
        with scope.RecordingScope(
            seen=dict(zip(map(id, variables), state, strict=True))
        ) as inside:
            out = fn(*args)
            self.assigned.update(inside.assigned)
            values = [inside.current(v) for v in self.variables]
        self.layers = [layer for layer, _ in inside.added]
        return out, values, [loss for _, loss in inside.added]

    @property
    def variables(self) -> list[keras.Variable]:
        return list(self.assigned.values())

    def carry_out(self, values: Sequence[Any], losses: Sequence[Any] = ()) -> None:
        scope.assign_all(self.variables, values)
        scope.add_losses(self.layers, losses)


def run_if(
    predicate: Any, fn: Callable[[], Any], otherwise: Callable[[], Any] | None = None
) -> None:
    """See `keras_ext.backend`."""
    if isinstance(predicate, jax.core.Tracer):
        _branch(predicate, scope.returning_nothing(fn), scope.returning_nothing(otherwise))
    elif predicate:
        fn()
    elif otherwise is not None:
        otherwise()


def run_either(
    predicate: Any,
    true_fn: Callable[[Any], Any],
    false_fn: Callable[[Any], Any],
    inputs: Any,
    recompute: bool = False,
) -> Any:
    """See `keras_ext.backend`."""
    if isinstance(predicate, jax.core.Tracer):
        return _branch(predicate, lambda: true_fn(inputs), lambda: false_fn(inputs))
    return true_fn(inputs) if predicate else false_fn(inputs)


def _branch(predicate: Any, fn: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    pure = _Pure()

    def recorded(branch: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            out, values, losses = pure.call(branch)
            if losses:
                raise scope.loss_in_a_branch(pure.layers)
            return out, values

        return run

    # So that `fn` is known to leave what this one assigns. Traced last, it leaves that of `fn`.
    jax.eval_shape(recorded(otherwise))
    out, values = jax.lax.cond(predicate, recorded(fn), recorded(otherwise))
    pure.carry_out(values)
    return out


def add_to(variables: Sequence[keras.Variable], tensors: Sequence[Any], scale: Any = 1) -> None:
    for variable, tensor in zip(variables, tensors, strict=True):
        tensor, factor = (jnp.asarray(x, variable.dtype) for x in (tensor, scale))
        variable.assign(variable.value + factor * tensor)


def stored_values(gradient: Any) -> Any:
    return gradient


def map_values(fn: Callable, gradient: Any) -> Any:
    return fn(gradient)


def densify(gradient: Any) -> Any:
    return gradient


def snapshot(variables: Iterable[keras.Variable]) -> list[Any]:
    return [v.value for v in variables]  # arrays do not change


def call_recorded(fn: Callable[[], Any]) -> tuple[Any, list[keras.Variable], list[Any]]:
    """See `keras_ext.backend`."""
    return scope.recorded_call(fn, snapshot)


def apply_gradients(
    optimizer: keras.Optimizer,
    grads: Sequence[Any],
    variables: Sequence[keras.Variable],
    after: Iterable[Any] = (),
    whole: Iterable[bool] = (),
) -> None:
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


def merge_replicas(fn: Callable, grads: Sequence[Any], *scalars: Any) -> None:
    """Nothing to merge: a JAX array is global, its gradient already covers all devices."""
    fn(grads, *scalars)


def num_replicas() -> int:
    return 1


def has_value(variable: keras.Variable) -> bool:
    """Whether the variable can be read.

    The JAX trainer empties the variables before a step and fills them after the epoch. When
    a step raises, it still ends `fit` the ordinary way, on empty or donated variables.
    """
    value = variable._value  # private: `value` would initialise an empty variable anew
    return value is not None and not value.is_deleted()


def concrete(tensor: Any) -> Any:
    """See `keras_ext.backend`."""
    if isinstance(tensor, jax.core.Tracer):
        return None
    if isinstance(tensor, jax.Array):
        on_host = all(device.platform == "cpu" for device in tensor.devices())
        return np.asarray(tensor) if on_host and tensor.is_fully_addressable else None
    return np.asarray(tensor)


def value_and_grad(fn: Callable, has_aux: bool = False, constant: bool = False) -> Callable:
    """See `keras_ext.backend`."""

    def run(x: Any, *args: Any) -> Any:
        pure = _Pure()

        def value_and_rest(x: Any) -> Any:
            out, *rest = pure.call(fn, x, *args)
            return (out[0] if has_aux else out), (out, *rest)

        (_, (out, *rest)), grads = jax.value_and_grad(value_and_rest, has_aux=True)(
            keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        )
        pure.carry_out(*rest)
        return jax.lax.stop_gradient((out, grads)) if constant else (out, grads)

    return run


def recompute(fn: Callable, tensors: Sequence[Any]) -> Any:
    """See `keras_ext.backend`. The tensors are not arguments, as they have Keras masks."""
    pure = _Pure()
    out, *rest = jax.checkpoint(lambda: pure.call(fn, *tensors))()
    pure.carry_out(*rest)
    return out


def map_chunks(fn: Callable, xs: Any) -> Any:
    """See `keras_ext.backend`."""
    pure = _Pure()
    xs = keras.tree.map_structure(keras.ops.convert_to_tensor, xs)
    # What `fn` assigns goes from turn to turn, so it has to be known before the first one.
    first = keras.tree.map_structure(lambda x: x[0], xs)
    jax.eval_shape(lambda: pure.call(fn, first))
    before = scope.current_values(pure.variables)

    @jax.checkpoint
    def turn(state: list[Any], x: Any) -> Any:
        out, state, losses = pure.call(fn, x, state=state)
        return state, (out, losses)

    values, (ys, losses) = jax.lax.scan(turn, before, xs)
    pure.carry_out(values, [loss.sum() for loss in losses])
    return ys


def product_flops(fn: Callable, specs: Iterable[tuple[tuple, str]]) -> int:
    """See `keras_ext.backend`."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in specs]
    return _count(jax.make_jaxpr(fn)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
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


def compile(
    fn: Callable, variables: Sequence[keras.Variable], jit_compile: bool = True
) -> Callable:
    """See `keras_ext.backend`. The values are arguments, so that they can change."""
    variables = list(variables)

    @jax.jit
    def pure(values: list[Any], *args: Any) -> Any:
        with scope.RecordingScope(variables, values) as inside:
            out = fn(*args)
        scope.check_listed(inside.assigned.values(), variables)
        # By index: each signature of the arguments is traced, and may assign others.
        places = [i for i, v in enumerate(variables) if id(v) in inside.assigned]
        return out, {i: inside.state_mapping[id(variables[i])] for i in places}

    def run(*args: Any) -> Any:
        out, values = pure([v.value for v in variables], *args)
        scope.assign_all([variables[i] for i in values], values.values())
        return out

    return run


def wrap_array(array: np.ndarray) -> Any:
    """See `keras_ext.backend`."""
    return jax.device_put(array, may_alias=True)


def sync_variables(model: keras.Model) -> None:
    """See `keras_ext.backend`. While it trains, the values are arguments of the step."""
    model.jax_state_sync()


def generator_state() -> None:
    """See `keras_ext.backend`. All draws are of variables."""
