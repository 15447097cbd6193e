"""TensorFlow: sparse gradients of embeddings, and replicas under `tf.distribute`."""

import keras
import tensorflow as tf


def cond(predicate, true_fn, false_fn, variables):
    """Run `true_fn()` or `false_fn()`; `variables` is what JAX needs to know.

    Returns: a tensor that exists when the branch is done, for `apply_gradients(after=)`.
    """

    def branch(fn):
        def run():
            fn()
            return tf.constant(0)  # both branches of a tf.cond return the same structure

        return run

    predicate = keras.ops.convert_to_tensor(predicate)
    return tf.cond(predicate, branch(true_fn), branch(false_fn))


def add_to(variables, tensors):
    """`variable += tensor`; of an `IndexedSlices` only the rows that occur are touched."""
    for variable, tensor in zip(variables, tensors, strict=True):
        tensor = tf.cast(tensor, variable.dtype)
        if isinstance(tensor, tf.IndexedSlices):
            variable.value.scatter_add(tensor)  # sums rows that occur more than once
        else:
            variable.value.assign_add(tensor)


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


def apply_gradients(optimizer, grads, variables, after=()):
    """One update. Outside the replicas of a strategy, enter them for it.

    Rows of repeated tokens are summed before: the optimizers of Keras would square and clip
    them one by one. Keras sums the gradients over the replicas after it clipped them in each.
    Here they are summed already, so the first replica brings the sum and the others zeros:
    both the clipping and the sum come out exactly as on a single device.

    `after`: what was read of the variables before. It has to be said: in a graph under load,
    some copies of a weight held the value after the update (TensorFlow 2.21).
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
            optimizer.apply(
                [None if g is None else tf.where(first, g, tf.zeros_like(g)) for g in grads],
                variables,
            )

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
