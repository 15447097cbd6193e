"""TensorFlow: sparse gradients of embeddings, and replicas under `tf.distribute`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from keras_ext.backend import scope
from keras_ext.backend.scope import substitute  # noqa: F401 # part of the seam
from keras_ext.backend.tensorflow_recompute import (  # noqa: F401 # parts of the seam
    densify,
    map_chunks,
    recompute,
    run_either,
    snapshot,
)


def run_if(
    predicate: Any, fn: Callable[[], Any], otherwise: Callable[[], Any] | None = None
) -> Any:
    """See `keras_ext.backend`."""
    predicate = tf.convert_to_tensor(predicate)
    if scope.is_open():  # what is assigned has to leave the conditional, as it waits there
        fn, otherwise = scope.returning_nothing(fn), scope.returning_nothing(otherwise)
        run_either(predicate, fn, otherwise, ())
        return tf.constant(False)
    done = _run_if(predicate, fn)
    return done if otherwise is None else _run_if(tf.logical_not(predicate), otherwise)


def _run_if(predicate: Any, fn: Callable[[], Any]) -> Any:
    def run() -> Any:
        fn()
        return tf.constant(False)

    if tf.distribute.has_strategy():  # a loop cannot enter the replicas
        return tf.cond(predicate, run, lambda: tf.constant(False))
    # A loop of at most one turn: XLA updates its variables in place where it would copy
    # those of a tf.cond in and out.
    return tf.while_loop(lambda due: due, lambda _: (run(),), (predicate,))[0]


def add_to(variables: Sequence[keras.Variable], tensors: Sequence[Any], scale: Any = 1) -> None:
    """`variable += scale * tensor`; of an `IndexedSlices` only the rows that occur."""
    for variable, tensor in zip(variables, tensors, strict=True):
        tensor, target = tf.cast(tensor, variable.dtype), variable.value
        factor = tf.cast(scale, variable.dtype)
        if isinstance(tensor, tf.IndexedSlices):
            # Sums rows that occur more than once.
            target.scatter_add(map_values(lambda v, factor=factor: factor * v, tensor))
        elif isinstance(target, tf.distribute.DistributedValues):
            target.assign_add(factor * tensor)
        else:  # product and sum in one pass
            tf.raw_ops.ResourceApplyGradientDescent(
                var=target.handle, alpha=-factor, delta=tensor
            )


def stored_values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_values(fn: Callable, gradient: Any) -> Any:
    """Apply an elementwise `fn` with fn(0) = 0 to the values that the gradient stores."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(fn(gradient.values), gradient.indices, gradient.dense_shape)
    return fn(gradient)


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
    """See `keras_ext.backend`. Outside the replicas of a strategy, enter them for it.

    Rows of repeated tokens are summed before: the optimizers of Keras would square and clip
    them one by one. Keras sums the gradients over the replicas after it clipped them in each.
    Here they are summed already, so the first replica brings the sum and the others zeros:
    both the clipping and the sum come out exactly as on a single device.

    What was read `after` has to be said: in a graph under load, some copies of a weight held
    the value after the update (TensorFlow 2.21).
    """
    grads = [None if g is None else densify(g) for g in grads]
    after = [tensor for tensor in after if tensor is not None]
    strategy = getattr(variables[0].value, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        with tf.control_dependencies(after):
            optimizer.apply(grads, variables)
        return

    def in_replica(*grads: Any) -> None:
        first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
        with tf.control_dependencies(after):
            shares = [
                None if g is None else tf.where(tf.logical_or(first, w), g, tf.zeros_like(g))
                for w, g in zip(whole, grads, strict=True)
            ]
            optimizer.apply(shares, variables)

    with strategy.scope():
        strategy.extended.call_for_each_replica(in_replica, args=tuple(grads))


def merge_replicas(fn: Callable, grads: Sequence[Any], *scalars: Any) -> None:
    """Call `fn(grads, *scalars)` once, with the sums over all replicas.

    A conditional must not stand inside a replica when one of its branches merges the
    replicas again (an optimizer does), so `fn` runs in the cross-replica context.
    """
    if not tf.distribute.has_strategy():
        fn(grads, *scalars)
        return

    def merged(strategy: Any, grads: Sequence[Any], *scalars: Any) -> None:
        def total(value: Any) -> Any:
            if value is None:
                return None
            return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

        fn([total(g) for g in grads], *map(total, scalars))

    dense = [None if g is None else densify(g) for g in grads]
    tf.distribute.get_replica_context().merge_call(merged, args=(dense, *scalars))


def num_replicas() -> int:
    """Replicas of the current `tf.distribute` strategy; each brings its share of a gradient."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def has_value(variable: keras.Variable) -> bool:
    return True


def concrete(tensor: Any) -> Any:
    """See `keras_ext.backend`."""
    if not tf.is_tensor(tensor):
        return np.asarray(tensor)
    # The tensors of a graph have no method `numpy`.
    seen = hasattr(tensor, "numpy") and "CPU:" in tensor.device
    return tensor.numpy() if seen else None


def value_and_grad(fn: Callable, has_aux: bool = False, constant: bool = False) -> Callable:
    """See `keras_ext.backend`."""

    def run(x: Any, *args: Any) -> Any:
        # New tensors: the gradient is that of this use of x, also if `args` hold it.
        x = keras.tree.map_structure(lambda t: tf.identity(tf.convert_to_tensor(t)), x)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            out = fn(x, *args)
            value = out[0] if has_aux else out
        flat = tape.gradient(
            value, keras.tree.flatten(x), unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        result = out, keras.tree.pack_sequence_as(x, [densify(g) for g in flat])
        return keras.tree.map_structure(tf.stop_gradient, result) if constant else result

    return run


def product_flops(fn: Callable, specs: Iterable[tuple[tuple, str]]) -> int:
    """See `keras_ext.backend`."""
    arguments = [tf.TensorSpec(shape, dtype) for shape, dtype in specs]
    graph = tf.function(fn).get_concrete_function(*arguments).graph
    return sum(_count(operation) for operation in graph.get_operations())


def _count(operation: Any) -> int:
    shapes = [tuple(x.shape) for x in operation.inputs]
    if operation.type in ("MatMul", "BatchMatMulV2", "BatchMatMulV3"):
        turned = "transpose_a" if operation.type == "MatMul" else "adj_x"
        inner = shapes[0][-2 if operation.get_attr(turned) else -1]
        return 2 * inner * math.prod(operation.outputs[0].shape)
    if operation.type == "Einsum":
        labels = operation.get_attr("equation").decode().split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for names, shape in zip(labels, shapes, strict=True):
            sizes.update(zip(names, shape, strict=True))
        return 2 * math.prod(sizes.values()) if len(shapes) > 1 else 0
    if operation.type in ("Conv2D", "Conv3D"):
        return 2 * math.prod(shapes[1][:-1]) * math.prod(operation.outputs[0].shape)
    if operation.type == "DepthwiseConv2dNative":
        return 2 * math.prod(shapes[1][:2]) * math.prod(operation.outputs[0].shape)
    if operation.type in ("While", "StatelessWhile"):
        raise ValueError("A loop cannot be counted on TensorFlow. Set KERAS_BACKEND=jax.")
    return 0


def compile(
    fn: Callable, variables: Sequence[keras.Variable], jit_compile: bool = True
) -> Callable:
    """See `keras_ext.backend`."""
    return tf.function(fn, jit_compile=jit_compile)


def wrap_array(array: np.ndarray) -> Any:
    """See `keras_ext.backend`."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())  # others copy twice


def sync_variables(model: keras.Model) -> None:
    """See `keras_ext.backend`."""


def generator_state() -> None:
    """See `keras_ext.backend`. All draws are of variables."""


def values_after(
    fn: Callable[[], Any], variables: list[keras.Variable], values: list[Any]
) -> NoReturn:
    """See `keras_ext.backend`."""
    raise ValueError(
        "Optimizers of Keras have no pure update on TensorFlow: they assign a tf.Variable."
    )
