"""TensorFlow: sparse gradients of embeddings, and replicas under `tf.distribute`."""

import math

import keras
import numpy as np
import tensorflow as tf


def run_if(predicate, fn, otherwise=None):
    """See `keras_ext.backend`."""
    predicate = tf.convert_to_tensor(predicate)
    done = _run_if(predicate, fn)
    return done if otherwise is None else _run_if(tf.logical_not(predicate), otherwise)


def _run_if(predicate, fn):
    def run():
        fn()
        return tf.constant(False)

    if tf.distribute.has_strategy():  # a loop cannot enter the replicas
        return tf.cond(predicate, run, lambda: tf.constant(False))
    # A loop of at most one turn: XLA updates its variables in place where it would copy
    # those of a tf.cond in and out.
    return tf.while_loop(lambda due: due, lambda _: (run(),), (predicate,))[0]


def add_to(variables, tensors, scale=1):
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


def values(gradient):
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_values(fn, gradient):
    """Apply an elementwise `fn` with fn(0) = 0 to the values that the gradient stores."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(fn(gradient.values), gradient.indices, gradient.dense_shape)
    return fn(gradient)


def densify(gradient):
    """Of an `IndexedSlices`, the whole table: rows that occur more than once are summed."""
    return tf.convert_to_tensor(gradient)


def copies(variables):
    return [tf.identity(v.value) for v in variables]


def apply_gradients(optimizer, grads, variables, after=(), whole=()):
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

    def in_replica(*grads):
        first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
        with tf.control_dependencies(after):
            shares = [
                None if g is None else tf.where(tf.logical_or(first, w), g, tf.zeros_like(g))
                for w, g in zip(whole, grads, strict=True)
            ]
            optimizer.apply(shares, variables)

    with strategy.scope():
        strategy.extended.call_for_each_replica(in_replica, args=tuple(grads))


def merge_replicas(fn, grads, *scalars):
    """Call `fn(grads, *scalars)` once, with the sums over all replicas.

    A conditional must not stand inside a replica when one of its branches merges the
    replicas again (an optimizer does), so `fn` runs in the cross-replica context.
    """
    if not tf.distribute.has_strategy():
        fn(grads, *scalars)
        return

    def merged(strategy, grads, *scalars):
        def total(value):
            if value is None:
                return None
            return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

        fn([total(g) for g in grads], *map(total, scalars))

    dense = [None if g is None else densify(g) for g in grads]
    tf.distribute.get_replica_context().merge_call(merged, args=(dense, *scalars))


def num_replicas():
    """Replicas of the current `tf.distribute` strategy; each brings its share of a gradient."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def has_value(variable):
    return True


def concrete(tensor):
    """See `keras_ext.backend`."""
    if not tf.is_tensor(tensor):
        return np.asarray(tensor)
    # The tensors of a graph have no method `numpy`.
    seen = hasattr(tensor, "numpy") and "CPU:" in tensor.device
    return tensor.numpy() if seen else None


def value_and_grad(fn, has_aux=False):
    """See `keras_ext.backend`."""

    def run(x, *args):
        # New tensors: the gradient is that of this use of x, also if `args` hold it.
        x = keras.tree.map_structure(lambda t: tf.identity(tf.convert_to_tensor(t)), x)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            out = fn(x, *args)
            value = out[0] if has_aux else out
        flat = tape.gradient(
            value, keras.tree.flatten(x), unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return out, keras.tree.pack_sequence_as(x, [densify(g) for g in flat])

    return run


def cond(predicate, true_fn, false_fn, inputs, variables, recompute=False):
    """See `keras_ext.backend`.

    The gradient of a tf.cond takes what the branches computed out of it, and each pads what the
    other gives with placeholders of unknown size, at which XLA stops. With `recompute` the
    gradient is a tf.cond of its own, that goes forwards and back within the branch.
    """
    if not recompute or tf.executing_eagerly():
        return tf.cond(predicate, lambda: true_fn(inputs), lambda: false_fn(inputs))

    @tf.custom_gradient
    def run(x):  # x is `inputs` itself, with its mask
        before = list(zip(variables, copies(variables), strict=True))
        constant = {id(v.value) for v in variables}

        def grad(upstream, variables=()):  # the weights that the branches read
            weights = [w for w in variables if id(w) not in constant]

            def again(fn):
                def gradients():
                    # State is read as it was before, and what is assigned is forgotten.
                    state = keras.StatelessScope(before, initialize_variables=False)
                    with state, tf.GradientTape(watch_accessed_variables=False) as tape:
                        tape.watch([x, *weights])
                        y = fn(x)
                    zero = tf.UnconnectedGradients.ZERO
                    return [densify(g) for g in tape.gradient(y, [x, *weights], upstream, zero)]

                return gradients

            of_x, *rest = tf.cond(predicate, again(true_fn), again(false_fn))
            of_weights = dict(zip(map(id, weights), rest, strict=True))
            return of_x, [of_weights.get(id(w)) for w in variables]

        return tf.cond(predicate, lambda: true_fn(x), lambda: false_fn(x)), grad

    return run(inputs)


def recompute(fn, tensors, variables):
    """See `keras_ext.backend`."""
    given = [i for i, tensor in enumerate(tensors) if tensor is not None]

    def call(flat):
        arguments = list(tensors)
        for i, tensor in zip(given, flat, strict=True):
            arguments[i] = _like(tensor, tensors[i])
        return fn(*arguments)

    @tf.custom_gradient
    def run(*flat):
        before = list(zip(variables, copies(variables), strict=True))
        constant = {id(v.value) for v in variables}

        def grad(upstream, variables=()):
            weights = [w for w in variables if id(w) not in constant]
            state = keras.StatelessScope(before, initialize_variables=False)
            # After the gradient that comes in, and on copies: else a graph would find that it
            # has computed all this before, and keep it.
            with tf.control_dependencies([upstream]):
                again = [tf.identity(x) for x in flat]
            with state, tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([*again, *weights])
                y = call(again)
            zero = tf.UnconnectedGradients.ZERO
            found = [densify(g) for g in tape.gradient(y, [*again, *weights], upstream, zero)]
            of_weights = dict(zip(map(id, weights), found[len(flat) :], strict=True))
            return found[: len(flat)], [of_weights.get(id(w)) for w in variables]

        return call(flat), grad

    return run(*(tensors[i] for i in given))


def _like(tensor, other):
    """The tensor with the Keras mask of another."""
    mask = getattr(other, "_keras_mask", None)  # private: there is no public way to set one
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def product_flops(fn, specs):
    """See `keras_ext.backend`."""
    arguments = [tf.TensorSpec(shape, dtype) for shape, dtype in specs]
    graph = tf.function(fn).get_concrete_function(*arguments).graph
    return sum(_count(operation) for operation in graph.get_operations())


def _count(operation):
    shapes = [tuple(x.shape) for x in operation.inputs]
    if operation.type in ("MatMul", "BatchMatMulV2", "BatchMatMulV3"):
        turned = "transpose_a" if operation.type == "MatMul" else "adj_x"
        inner = shapes[0][-2 if operation.get_attr(turned) else -1]
        return 2 * inner * math.prod(operation.outputs[0].shape)
    if operation.type == "Einsum":
        labels = operation.get_attr("equation").decode().split("->")[0].split(",")
        sizes = {}
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


def compile(fn, variables, jit_compile=True):
    """See `keras_ext.backend`."""
    return tf.function(fn, jit_compile=jit_compile)


def adopt(array):
    """See `keras_ext.backend`."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())  # others copy twice
