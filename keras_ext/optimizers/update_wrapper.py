"""Base of wrappers that change the step of the inner optimizer, variable by variable."""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.numerics import cast_up
from keras_ext.optimizers import nesting
from keras_ext.optimizers.wrapper import OptimizerWrapper


class UpdateWrapper(OptimizerWrapper):
    """Base of wrappers that change the step of the inner optimizer, variable by variable.

        w <- rewrite(w, w'),    w' = where the inner optimizer goes from w

    What acts inside (clipping, weight decay, momentum) acts before; the constraint of a weight
    that w' moved is applied once more afterwards. Where the inner optimizer waits, w' = w and
    nothing moves. A subclass defines `rewrite`, and `rewrites` if it leaves some variables
    alone.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        name: name of the wrapper; default, the class name in snake case.

    Raises:
        ValueError: something inside follows the weights (a moving average, slow weights,
            factors) and would follow w' instead of the weights.

    Example:
        >>> class Halved(UpdateWrapper):
        ...     def rewrite(self, index, old, new, grad, before):
        ...         return (old + new) / 2
        >>> model.compile(Halved(keras.optimizers.Adam(1e-3)), loss="mse")
        >>> history = model.fit(x, y, verbose=0)
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None):
        super().__init__(optimizer, name=name)
        nesting.refuse(
            self,
            nesting.follows_weights,
            "{wrapper} changes the steps that {kind} of {name!r} keeps account of. Put it "
            "inside: the wrapper that follows the weights goes outside (for use_ema, "
            "EMAOptimizer).",
        )

    def rewrites(self, index: int) -> bool:
        """Whether the steps of variable `index` are changed at all."""
        return True

    def constrains(self, index: int) -> bool:
        """Whether the constraint of variable `index` is applied to what `rewrite` returns."""
        return True

    def before_step(self) -> Any:
        """Tensors that `rewrite` has to know from before the inner step."""
        return ()

    def rewrite(self, index: int, old: Any, new: Any, grad: Any, before: Any) -> Any:
        """The new value of variable `index`.

        Args:
            index: which variable.
            old: w, in float32 (float64) whatever the variable is.
            new: w', likewise.
            grad: the gradient as one tensor, None if there is none.
            before: what `before_step` returned.
        """
        raise NotImplementedError

    def update(self, grads: list) -> None:
        variables = self.inner_variables
        chosen = [i for i in range(len(grads)) if self.rewrites(i) and self.is_gradient(i)]
        old = backend.snapshot([variables[i] for i in chosen])
        before = self.before_step()
        self.step_inner(grads, after=[*old, *keras.tree.flatten(before)])
        for i, w in zip(chosen, old, strict=True):
            variable = variables[i]
            new = ops.stop_gradient(variable.value)
            constraint = variable.constraint if self.constrains(i) else None
            moved = None if constraint is None else ops.any(new != w)
            variable.assign(self.rewrite(i, cast_up(w), cast_up(new), grads[i], before))
            if constraint is not None:
                value = constraint(variable)
                variable.assign(ops.where(moved, value, variable.value))
