"""The recording scope, on which all stands that runs a function apart or more than once."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import keras


class RecordingScope(keras.StatelessScope):
    """Reads through to the scope outside, and records what is assigned and added as a loss.

    Nothing is carried out: see `assign_outside` and `add_losses`.

    Args:
        variables: those that have other values inside.
        values: these values.
        seen: values by the id of their variable, as from `seen_outside`.

    Attributes:
        assigned: variables that were assigned inside, by id.
        losses: what layers added inside by `add_loss`.
    """

    def __init__(
        self,
        variables: Iterable[keras.Variable] = (),
        values: Iterable[Any] = (),
        seen: dict[int, Any] | None = None,
    ) -> None:
        # A variable made while JAX traces must not be initialised there.
        traces = keras.backend.backend() == "jax"
        super().__init__(
            list(zip(variables, values, strict=True)),
            collect_losses=True,
            initialize_variables=not traces,
        )
        self.state_mapping: dict[int, Any] = {**(seen or {}), **self.state_mapping}
        self.assigned: dict[int, keras.Variable] = {}
        self._added: list[tuple[keras.Layer, Any]] = []

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        super().add_update(update)
        self.assigned[id(update[0])] = update[0]

    def add_loss(self, loss: Any) -> None:
        super().add_loss(loss)
        # Keras finds the layer by the id of the tensor. What leaves a traced function has a new
        # one, so the layer has to be known, and only the caller, `Layer.add_loss`, knows it.
        self._added.append((sys._getframe(1).f_locals["self"], loss))

    @property
    def added(self) -> list[tuple[keras.Layer, Any]]:
        """The losses with their layers, without those that a later call of a layer cleared."""
        kept = set(map(id, self.losses))
        return [(layer, loss) for layer, loss in self._added if id(loss) in kept]

    def current(self, variable: keras.Variable) -> Any:
        """The value inside, in the dtype of the variable where a layer would read another."""
        value = self.get_current_value(variable)
        if value is None:
            value = variable._value  # private: `value` may be cast for a layer
        return variable.value if value is None else value

    def assign_outside(self, discard: Iterable[keras.Variable] = ()) -> None:
        forgotten = set(map(id, discard))
        kept = [v for key, v in self.assigned.items() if key not in forgotten]
        assign_all(kept, [self.state_mapping[id(v)] for v in kept])

    def add_losses_outside(self) -> None:
        for layer, loss in self.added:
            layer.add_loss(loss)


def assign_all(variables: Iterable[keras.Variable], values: Iterable[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def add_losses(layers: Iterable[keras.Layer], losses: Iterable[Any]) -> None:
    for layer, loss in zip(layers, losses, strict=True):
        layer.add_loss(loss)


def is_open() -> bool:
    """Whether an assignment waits for the end of a scope."""
    with RecordingScope() as now:
        return now.original_scope is not None


def current_values(variables: Iterable[keras.Variable]) -> list[Any]:
    """The values outside of any cast; on TensorFlow and PyTorch no copies."""
    with RecordingScope() as now:
        return [now.current(v) for v in variables]


def seen_outside() -> dict[int, Any]:
    """What the scopes that are open now say of variables, by id of the variable.

    A function that is run again when they are closed has to read this.
    """
    with RecordingScope() as innermost:
        scopes: list[Any] = [innermost]
    while isinstance(scopes[-1], RecordingScope) and scopes[-1].original_scope is not None:
        scopes.append(scopes[-1].original_scope)
    return {key: value for s in reversed(scopes) for key, value in s.state_mapping.items()}


@contextlib.contextmanager
def losses_kept() -> Iterator[None]:
    """A context in which no layer forgets the losses that it added before.

    One that is called from outside of any other does. Here it is as if another called it.
    """
    caller = keras.Layer(name="caller")
    caller._get_call_context()  # private, as is the next: there is no public way
    try:
        yield
    finally:
        caller._maybe_reset_call_context()


@contextlib.contextmanager
def substitute(
    variables: Iterable[keras.Variable],
    values: Iterable[Any],
    discard: Literal["all"] | Iterable[keras.Variable] = (),
    generator: Any = None,
) -> Iterator[RecordingScope]:
    """See `keras_ext.backend`. All draws are of variables here, so `generator` is None."""
    inside = RecordingScope(variables, values)
    with losses_kept(), inside:
        yield inside
    if discard != "all":
        inside.assign_outside(discard)


def recorded_call(
    fn: Callable[[], Any], snapshot: Callable[[Iterable[keras.Variable]], list[Any]]
) -> tuple[Any, list[keras.Variable], list[Any]]:
    """See `keras_ext.backend`."""
    with losses_kept(), RecordingScope() as inside:
        out = fn()
    variables = list(inside.assigned.values())
    before = snapshot(variables)
    inside.assign_outside()
    inside.add_losses_outside()
    return out, variables, before


def values_after(
    fn: Callable[[], Any], variables: list[keras.Variable], values: list[Any]
) -> list[Any]:
    """See `keras_ext.backend`."""
    inside = RecordingScope(variables, values)
    with inside:
        fn()
    check_listed(inside.assigned.values(), variables)
    return [inside.state_mapping[id(v)] for v in variables]


def check_listed(
    assigned: Iterable[keras.Variable], variables: Iterable[keras.Variable]
) -> None:
    listed = set(map(id, variables))
    unlisted = [v.path for v in assigned if id(v) not in listed]
    if unlisted:
        raise ValueError(f"variables must list all that fn assigns, but {unlisted} are not.")


def loss_in_a_branch(layers: Iterable[keras.Layer]) -> ValueError:
    names = [layer.name for layer in layers]
    return ValueError(
        f"A loss that one branch adds cannot leave a conditional: layers {names}."
    )


def returning_nothing(fn: Callable[[], Any] | None) -> Callable[..., tuple]:
    """`fn` as a branch whose result does not matter; None does nothing."""

    def run(*inputs: Any) -> tuple:
        if fn is not None:
            fn()
        return ()

    return run
