"""What stands inside an optimizer, and what may.

The optimizers inside are those of our wrappers, of `LossScaleOptimizer` and of
`MultiOptimizer`, in all branches. What a wrapper may hold depends on four properties:

    accumulates       gradients of several steps make one update
    follows_weights   the state is computed from the weights: nothing else may move them
    scales_loss       gradients arrive multiplied by a scale that changes
    has_one_rate      there is a single learning rate, as `optimizer.learning_rate`
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras

# Keras optimizers that compute the weights from their state.
FOLLOWERS = tuple(
    getattr(keras.optimizers, name)
    for name in ("Ftrl", "ScheduleFreeAdamW")
    if hasattr(keras.optimizers, name)
)
MULTI = getattr(keras.optimizers, "MultiOptimizer", ())  # absent from older Keras


def branches(optimizer: Any) -> list:
    """The optimizers directly inside."""
    if isinstance(optimizer, MULTI):
        return list(optimizer.optimizers)
    names = getattr(optimizer, "branch_names", ("inner_optimizer",))
    return [getattr(optimizer, name) for name in names if hasattr(optimizer, name)]


def chain(optimizer: Any) -> Iterator[Any]:
    """The optimizer and all inside, outermost first."""
    yield optimizer
    for branch in branches(optimizer):
        yield from chain(branch)


def find(optimizer: Any, kind: type | tuple) -> Any:
    """The outermost optimizer of a kind in the chain, or None."""
    return next((o for o in chain(optimizer) if isinstance(o, kind)), None)


def accumulates(optimizer: Any) -> bool:
    own = getattr(optimizer, "accumulates", False)
    return own or bool(optimizer.gradient_accumulation_steps)


def follows_weights(optimizer: Any) -> bool:
    own = getattr(optimizer, "follows_weights", isinstance(optimizer, FOLLOWERS))
    return own or bool(optimizer.use_ema)


def scales_loss(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def has_one_rate(optimizer: Any) -> bool:
    return len(branches(optimizer)) <= 1 and not isinstance(optimizer, MULTI)


def refuse(wrapper: Any, what: Callable[[Any], bool], message: str) -> None:
    """Raise a ValueError if the wrapper holds an optimizer of a property.

    Args:
        wrapper: the wrapper, whose inner optimizers are looked at.
        what: the property, one of the functions above.
        message: the error, in which {wrapper}, {kind} and {name} are filled in.
    """
    for branch in branches(wrapper):
        for inner in chain(branch):
            if what(inner):
                kind = "use_ema=True" if inner.use_ema else type(inner).__name__
                wrapper_kind = type(wrapper).__name__
                raise ValueError(
                    message.format(wrapper=wrapper_kind, kind=kind, name=inner.name)
                )
