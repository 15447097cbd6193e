"""TensorFlow: functions that run in a conditional, in a loop, or again for the gradient.

Each is made a function of flat tensors first (`_Pure`), as a `tf.cond`, a `tf.while_loop` and a
`tf.custom_gradient` take them, so what it assigns leaves it as an output.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ext.backend import scope

_ZERO = tf.UnconnectedGradients.ZERO


def densify(gradient: Any) -> Any:
    """Of an `IndexedSlices`, the whole table: rows that occur more than once are summed."""
    return tf.convert_to_tensor(gradient)


def snapshot(variables: Iterable[keras.Variable]) -> list[Any]:
    return [tf.identity(v) for v in scope.current_values(variables)]


class _Pure:
    """Functions of one structure as functions of flat tensors, which assign nothing.

    The tensors are the leaves of `inputs`, then what the scopes outside say of variables: the
    gradient reaches both, and the scopes may be closed when a function is run again for it.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.leaves = keras.tree.flatten(inputs)
        self.given = [i for i, leaf in enumerate(self.leaves) if leaf is not None]
        seen = scope.seen_outside()
        self.seen = list(seen)
        self.tensors = [*(self.leaves[i] for i in self.given), *seen.values()]
        self.assigned: dict[int, keras.Variable] = {}  # by any call
        self.layers: list[keras.Layer] = []  # those that added losses, and
        self.outputs: Any = None  # what was returned, in the last call

    @property
    def variables(self) -> list[keras.Variable]:
        return list(self.assigned.values())

    def call(self, fn: Callable, flat: Sequence[Any], state: Sequence[Any] = ()) -> Any:
        """Leaves that `fn` returns, the losses it adds, the values it leaves.

        `state` is what the variables held before, if they may hold something else by now.
        """
        leaves, number = list(self.leaves), len(self.given)
        for i, tensor in zip(self.given, flat[:number], strict=True):
            leaves[i] = _like(tensor, leaves[i])
        known = dict(zip(self.seen, flat[number:], strict=True))
        if state:
            known.update(zip(self.assigned, state, strict=True))
        with scope.RecordingScope(seen=known) as inside:
            self.outputs = fn(keras.tree.pack_sequence_as(self.inputs, leaves))
        self.assigned.update(inside.assigned)
        self.layers = [layer for layer, _ in inside.added]
        values = [tf.identity(inside.current(v)) for v in self.variables]
        outputs = [tf.convert_to_tensor(y) for y in keras.tree.flatten(self.outputs)]
        return outputs, [loss for _, loss in inside.added], values

    def trace(self, fn: Callable, inputs: Sequence[Any] | None = None) -> list[tf.TensorSpec]:
        """Find out what `fn` assigns and returns, in a graph that is never run."""
        flat = self.tensors if inputs is None else [*inputs, *self.tensors[len(self.given) :]]
        specs: list[tf.TensorSpec] = []

        def look() -> None:
            outputs, losses, _ = self.call(fn, flat)
            specs.extend(tf.TensorSpec(y.shape, y.dtype) for y in [*outputs, *losses])

        tf.function(look, autograph=False).get_concrete_function()
        return specs

    def gradients(
        self,
        fn: Callable,
        flat: Sequence[Any],
        state: Sequence[Any],
        weights: Any,
        upstream: Any,
    ) -> list[Any]:
        """Of `fn`, computed again: to those of `flat` that are floats, then to the weights."""
        sources = [*filter(_is_float, flat), *weights]
        watched = tf.GradientTape(watch_accessed_variables=False)
        with scope.losses_kept(), watched as tape:
            tape.watch(sources)
            outputs, losses, _ = self.call(fn, flat, state)
        pairs = zip([*outputs, *losses], upstream, strict=True)
        kept = [(y, u) for y, u in pairs if _is_float(y)]
        found = tape.gradient([y for y, _ in kept], sources, [u for _, u in kept], _ZERO)
        return [densify(g) for g in found]

    def weights(self, variables: Sequence[Any]) -> list[Any]:
        """Of the variables that were read those that the gradient goes to."""
        state = {id(v) for v in scope.current_values(self.variables)}
        return [w for w in variables if _is_float(w) and id(w) not in state]


def _is_float(tensor: Any) -> bool:
    return tensor.dtype.is_floating


def _spread(
    found: Sequence[Any], flat: Sequence[Any], weights: Sequence[Any], variables: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Gradients as tf.custom_gradient takes them: None for what is no float or no weight."""
    rest = iter(found)
    of_flat = [next(rest) if _is_float(x) else None for x in flat]
    of_weights = dict(zip(map(id, weights), rest, strict=True))
    return of_flat, [of_weights.get(id(v)) for v in variables]


def run_either(
    predicate: Any,
    true_fn: Callable[[Any], Any],
    false_fn: Callable[[Any], Any],
    inputs: Any,
    recompute: bool = False,
) -> Any:
    """See `keras_ext.backend`.

    The gradient of a tf.cond takes what the branches computed out of it, and each pads what the
    other gives with placeholders of unknown size, at which XLA stops. With `recompute` the
    gradient is a tf.cond of its own, that goes forwards and back within the branch.

    What the branches assign leaves the tf.cond, as on JAX: within, nothing can be assigned that
    waits in a scope outside, or is summed over replicas.
    """
    if tf.executing_eagerly():
        return true_fn(inputs) if predicate else false_fn(inputs)
    pure = _Pure(inputs)
    for fn in (true_fn, false_fn):
        pure.trace(fn)
        if pure.layers:
            raise scope.loss_in_a_branch(pure.layers)
    values: list[Any] = []

    def forwards(*flat: Any) -> list[Any]:
        def branch(fn: Callable) -> Callable:
            def run() -> Any:
                outputs, _, values = pure.call(fn, flat)
                return outputs, values

            return run

        outputs, values[:] = tf.cond(predicate, branch(true_fn), branch(false_fn))
        return outputs

    @tf.custom_gradient
    def with_gradient(*flat: Any) -> Any:
        before = snapshot(pure.variables)

        def grad(*upstream: Any, variables: Sequence[Any] = ()) -> Any:
            weights = pure.weights(variables)

            def again(fn: Callable) -> Callable:
                return lambda: pure.gradients(fn, flat, before, weights, upstream)

            found = tf.cond(predicate, again(true_fn), again(false_fn))
            return _spread(found, flat, weights, variables)

        return forwards(*flat), grad

    outputs = (with_gradient if recompute else forwards)(*pure.tensors)
    scope.assign_all(pure.variables, values)
    return keras.tree.pack_sequence_as(pure.outputs, outputs)


def recompute(fn: Callable, tensors: Sequence[Any]) -> Any:
    """See `keras_ext.backend`."""
    pure = _Pure(list(tensors))
    values: list[Any] = []

    def call(arguments: list[Any]) -> Any:
        return fn(*arguments)

    @tf.custom_gradient
    def run(*flat: Any) -> Any:
        outputs, losses, values[:] = pure.call(call, flat)
        before = snapshot(pure.variables)  # nothing is assigned yet

        def grad(*upstream: Any, variables: Sequence[Any] = ()) -> Any:
            weights = pure.weights(variables)
            # After the gradient that comes in, and on copies: else a graph would find that it
            # has computed all this before, and keep it.
            with tf.control_dependencies(upstream):
                again = [tf.identity(x) for x in flat]
            found = pure.gradients(call, again, before, weights, upstream)
            return _spread(found, flat, weights, variables)

        return [*outputs, *losses], grad

    outputs = run(*pure.tensors)
    losses = outputs[len(outputs) - len(pure.layers) :]
    scope.assign_all(pure.variables, values)
    scope.add_losses(pure.layers, losses)
    return keras.tree.pack_sequence_as(pure.outputs, outputs[: len(outputs) - len(losses)])


def map_chunks(fn: Callable, xs: Any) -> Any:
    """See `keras_ext.backend`."""
    xs = keras.tree.map_structure(lambda x: tf.identity(tf.convert_to_tensor(x)), xs)
    pure = _Pure(xs)
    values: list[Any] = []
    number = len(pure.given)
    specs = pure.trace(fn, [x[0] for x in pure.tensors[:number]])
    turns = pure.tensors[0].shape[0]
    if turns is None:
        turns = tf.shape(pure.tensors[0])[0]

    def loop(turn: Callable, carried: list[Any], specs: Sequence[tf.TensorSpec]) -> Any:
        """`turn(i, carried)` gives what it hands on and what is kept of each turn."""

        def body(i: Any, carried: list[Any], arrays: list[Any]) -> Any:
            carried, kept = turn(i, carried)
            return i + 1, carried, [a.write(i, t) for a, t in zip(arrays, kept, strict=True)]

        arrays = [tf.TensorArray(s.dtype, turns, element_shape=s.shape) for s in specs]
        _, carried, arrays = tf.while_loop(
            lambda i, *_: i < turns,
            body,
            (tf.constant(0), carried, arrays),
            parallel_iterations=1,
            maximum_iterations=turns,
        )
        return carried, [a.stack() for a in arrays]

    def rows(flat: Sequence[Any], i: Any) -> list[Any]:
        return [*(tf.gather(x, i) for x in flat[:number]), *flat[number:]]

    @tf.custom_gradient
    def run(*flat: Any) -> Any:
        def turn(i: Any, state: list[Any]) -> Any:
            outputs, losses, new = pure.call(fn, rows(flat, i), state)
            return new, [*outputs, *losses, *state]

        before = snapshot(pure.variables)
        values[:], kept = loop(turn, before, [*specs, *map(tf.TensorSpec.from_tensor, before)])
        results, states = kept[: len(specs)], kept[len(specs) :]

        def grad(*upstream: Any, variables: Sequence[Any] = ()) -> Any:
            weights = pure.weights(variables)
            chunked = [x for x in flat[:number] if _is_float(x)]
            shared = [*filter(_is_float, flat[number:]), *weights]

            def turn(i: Any, sums: list[Any]) -> Any:
                state, up = ([tf.gather(t, i) for t in ts] for ts in (states, upstream))
                found = pure.gradients(fn, rows(flat, i), state, weights, up)
                count = len(chunked)
                return [s + g for s, g in zip(sums, found[count:], strict=True)], found[:count]

            sums, of_chunks = loop(
                turn,
                [tf.zeros(w.shape, w.dtype) for w in shared],
                [tf.TensorSpec(x.shape[1:], x.dtype) for x in chunked],
            )
            return _spread([*of_chunks, *sums], flat, weights, variables)

        return results, grad

    results = run(*pure.tensors)
    outputs = results[: len(results) - len(pure.layers)]
    scope.assign_all(pure.variables, values)
    scope.add_losses(pure.layers, map(tf.reduce_sum, results[len(outputs) :]))
    return keras.tree.pack_sequence_as(pure.outputs, outputs)


def _like(tensor: Any, other: Any) -> Any:
    """The tensor with the Keras mask of another."""
    mask = getattr(other, "_keras_mask", None)  # private: there is no public way to set one
    if mask is not None:
        tensor._keras_mask = mask
    return tensor
