"""One training step: what objectives see of it, and can change in it.

The pass that the trainer makes runs in a recording scope, so that what it assigned (seeds,
moving averages) is known and can be put back. Each call of an objective's loss has a state to
go back to: with `step.shifted` or `step.replaced`, passes within have the draws of its first
one. Outputs of layers are seen and changed by an attribute `call` of the instance, for the
time of the step.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.every import find_layer
from keras_ext.numerics import cast_up

# Gradients of a mean to float16 values may vanish unless the mean is scaled before. A power of
# two: exact in every dtype.
SCALE = 64.0


class Batch(NamedTuple):
    """What a loss function is given, in the structures of `fit`.

    Example:
        >>> Batch(x=np.ones((2, 4)), y=np.ones(2)).sample_weight is None
        True
    """

    x: Any
    y: Any = None
    sample_weight: Any = None


# inner() or inner(batch): the loss, a scalar, and the predictions.
Inner = Callable[..., tuple[Any, Any]]


class _Call:
    """One call of an objective's loss: its batch, and the state in which it began."""

    def __init__(self, batch: Batch, values: list[Any], generator: Any) -> None:
        self.batch, self.values, self.generator = batch, values, generator
        self.outputs: dict[keras.Layer, list[Any]] | None = None  # of its first pass


_current: ContextVar["Step | None"] = ContextVar("step", default=None)


class Step:
    """One training step of a model, as its objectives see it.

    Attributes:
        model: the model.

    Example:
        >>> class Noisy(Objective):
        ...     layers = ("token_embedding",)
        ...     def loss(self, inner, step):
        ...         loss, y_pred = inner()
        ...         layer = step.layer("token_embedding")
        ...         noise = [keras.random.normal(h.shape) for h in step.value(layer)]
        ...         with step.shifted(layer, noise):
        ...             return inner()[0], y_pred
    """

    def __init__(self, model: Any, layers: Sequence[keras.Layer]) -> None:
        self.model = model
        self.losses: list[Any] | None = None  # what the model's `losses` are to be now
        self._layers = layers
        self._passing = False
        self._outputs: dict[keras.Layer, list[Any]] = {}  # of the present pass
        self._changes: list[tuple[keras.Layer, Callable]] = []
        self._calls: list[_Call] = []
        self._depth = 0  # how many contexts are open that put something in place

    @staticmethod
    def of(model: Any) -> "Step | None":
        """The open step, if it is one of this model. Each replica (a thread) has its own."""
        step = _current.get()
        return step if step is not None and step.model is model else None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            with _observed([self.model, *self._layers]):
                yield
        finally:
            _current.reset(token)

    # What objectives use.

    @property
    def batch(self) -> Batch:
        """The batch that this call of `loss` is for."""
        return self._calls[-1].batch

    def layer(self, name: str) -> keras.Layer:
        """The layer of this name or path."""
        return find_layer(self.model, name)

    def value(self, target: keras.Variable | keras.Layer) -> Any:
        """The value of a weight, or the outputs of a layer, one for each of its calls.

        The outputs are those of the first pass that `inner` made.
        """
        if isinstance(target, keras.Variable):
            return ops.convert_to_tensor(target)
        outputs = self._calls[-1].outputs
        if outputs is None:
            raise ValueError(f"Call inner() before the outputs of {target.name} are asked for.")
        if not outputs.get(target):
            raise ValueError(
                f"{target.name} was not called in this pass, or is not in `layers` of the "
                "objective."
            )
        return outputs[target]

    @contextlib.contextmanager
    def replaced(self, target: keras.Variable | keras.Layer, value: Any) -> Iterator[None]:
        """A context in which the target has this value, of the structure of `value(target)`."""
        with self._changed(target, value, lambda output, new: new):
            yield

    @contextlib.contextmanager
    def shifted(self, target: keras.Variable | keras.Layer, shift: Any) -> Iterator[None]:
        """A context in which `shift`, of the structure of `value(target)`, is added to it."""
        if isinstance(target, keras.Variable):
            shift = self.value(target) + ops.cast(shift, target.dtype)
        with self._changed(target, shift, _add):
            yield

    def value_and_grad(
        self, inner: Inner, target: keras.Variable | keras.Layer, constant: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        """`inner()` on the draws of the pass before, and its gradient to the target.

        The gradient has the structure of `value(target)`, in float32 at least. With `constant`
        no gradient flows through what is returned; otherwise it can be differentiated in turn.
        """
        start, place = self.value(target), self.replaced
        if not isinstance(target, keras.Variable):
            start, place = zeros_like(start), self.shifted  # type: ignore[assignment]

        def scaled(value: Any) -> tuple[Any, Any, Any]:
            with place(target, value):
                loss, y_pred = inner()
            return SCALE * loss, loss, y_pred

        (_, *result), gradient = backend.value_and_grad(
            scaled, has_aux=True, constant=constant
        )(start)
        gradient = keras.tree.map_structure(lambda g: cast_up(g) / SCALE, gradient)
        return (result[0], result[1]), gradient

    def predict(self) -> Any:
        """Predictions of a pass in training, without the loss."""
        with backend.substitute((), (), discard=self.model.weights):
            return self.model(self.batch.x, **self._keywords)

    # The trainer's side.

    def compute_loss(self, batch: Batch, y_pred: Any, objectives: Sequence[Any]) -> Any:
        """The loss of the outermost objective, with the weight regularisers."""
        self._objectives = objectives
        seeds = [s.state for o in objectives for s in o.seed_generators]
        self._before += backend.snapshot(seeds)
        self._state += seeds
        losses = list(self.model.losses)
        regularisers = sum(v.regularizer is not None for v in self.model.trainable_weights)
        first = len(losses) - regularisers  # Keras has them at the end of the list
        self._clean: tuple | None = batch, y_pred, losses[:first], self._outputs
        loss, _ = self._nested(0, batch)
        for term in losses[first:]:
            loss = loss + ops.cast(ops.sum(term), loss.dtype)
        return loss / backend.num_replicas()

    def _nested(self, number: int, batch: Batch) -> tuple[Any, Any]:
        if number == len(self._objectives):
            return self._compiled(batch)
        if self._clean is not None and not self._depth:  # the trainer's pass is to be used yet
            values, generator = self._before, self._generator
        else:
            values, generator = backend.snapshot(self._state), backend.generator_state()
        call = _Call(batch, values, generator)

        def inner(other: Batch | None = None) -> tuple[Any, Any]:
            return self._nested(number + 1, call.batch if other is None else other)

        self._calls.append(call)
        try:
            return self._objectives[number].loss(inner, self)
        finally:
            self._calls.pop()

    def _compiled(self, batch: Batch) -> tuple[Any, Any]:
        """The loss of `compile`. The first pass on the batch is the trainer's own."""
        if self._clean is not None and not self._depth and batch is self._clean[0]:
            _, y_pred, losses, outputs = self._clean
            self._clean = None
        else:
            with backend.substitute((), (), discard=self.model.weights) as inside:
                y_pred = self.model(batch.x, **self._keywords)
            losses, outputs = list(inside.losses), self._outputs
        for call in self._calls:
            if call.outputs is None:
                call.outputs = outputs
        self.losses = losses
        try:
            loss = self.model.plain_loss(*batch[:2], y_pred, batch.sample_weight)
        finally:
            self.losses = None
        # A mean over this replica, as all that an objective computes itself.
        return loss * backend.num_replicas(), y_pred

    @contextlib.contextmanager
    def _changed(
        self, target: keras.Variable | keras.Layer, value: Any, change: Callable
    ) -> Iterator[None]:
        call = self._calls[-1]
        variables, values = self._state, call.values
        if isinstance(target, keras.Variable):
            variables, values = [*variables, target], [*values, value]
        elif target not in self._layers:
            raise ValueError(f"{target.name} is not in `layers` of the objective.")
        else:
            self._changes.append(
                (target, lambda number, output: change(output, value[number % len(value)]))
            )
        self._depth += 1
        try:
            with backend.substitute(variables, values, discard="all", generator=call.generator):
                yield
        finally:
            self._depth -= 1
            if not isinstance(target, keras.Variable):
                self._changes.pop()

    def observe(self, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """What stands in for `layer.call` while the step is open."""
        if layer is not self.model:
            return self._observe_layer(layer, call(*args, **kwargs))
        self._outputs, self._passing = {}, True
        try:
            if self._calls:
                return call(*args, **kwargs)
            # The trainer's own pass. What it assigns is put back for passes on its draws.
            self._keywords = {k: v for k, v in kwargs.items() if k == "training" and v}
            self._generator = backend.generator_state()
            out, self._state, self._before = backend.call_recorded(
                lambda: call(*args, **kwargs)
            )
            return out
        finally:
            self._passing = False

    def _observe_layer(self, layer: keras.Layer, output: Any) -> Any:
        if not self._passing:
            raise ValueError(
                f"The objective asks for the output of {layer.name}, which is computed again "
                "for the gradient (recompute=True). Name a layer outside of what is."
            )
        calls = self._outputs.setdefault(layer, [])
        for changed, change in self._changes:
            if changed is layer:
                output = change(len(calls), output)
        calls.append(output)
        return output


_observers: dict[int, int] = {}  # by the id of the layer: how many steps observe it


@contextlib.contextmanager
def _observed(layers: Sequence[Any]) -> Iterator[None]:
    """A context in which the calls of the layers go through the step of their thread.

    The replicas of a strategy are threads that take turns, so the attribute of a layer is set
    by the first that enters and taken away by the last that leaves.
    """
    for layer in layers:
        if not _observers.get(id(layer)):
            object.__setattr__(layer, "call", _observing(layer, layer.call))
        _observers[id(layer)] = _observers.get(id(layer), 0) + 1
    try:
        yield
    finally:
        for layer in layers:
            _observers[id(layer)] -= 1
            if not _observers[id(layer)]:
                del _observers[id(layer)]
                object.__delattr__(layer, "call")


def _observing(layer: Any, original: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        step = _current.get()
        if step is None:
            return original(*args, **kwargs)
        return step.observe(layer, original, args, kwargs)

    return call


def zeros_like(structure: Any) -> Any:
    return keras.tree.map_structure(ops.zeros_like, structure)


def _add(output: Any, shift: Any) -> Any:
    return keras.tree.map_structure(lambda o, s: o + ops.cast(s, o.dtype), output, shift)
