"""Layer adaptation: the trust ratio of LAMB and LARS on top of any optimizer.

    Delta = w' - w,    w' = where the inner optimizer goes from w
    w <- w + lr ||w|| / ||Delta|| Delta        if both norms are positive, otherwise w'

The step of each variable is lr times its norm, in the direction of the inner optimizer: a
relative step, which suits large batches. The size of the inner step cancels, so its learning
rate enters only as the lr in front (schedules included: it is read before each step).

With Delta = -lr u this is LAMB, w - lr (||w|| / ||u||) u: around Adam it is
`keras.optimizers.Lamb`, but for its epsilon. Around AdamW the decay is part of u, as in the
article. phi, which bounds the ratio there, is the identity, as in the implementations.

Exact up to the rounding of w': Delta is read back from the weights, each element to half a
unit in the last place of w (relative 1e-4 or less for steps of 1e-3 of the weight in
float32; bfloat16 weights are too coarse for it). Norms are taken in float32. Cost: a copy of
the weights, two norms and one scaling.

Source: You et al. 2019, arXiv 1904.00962; bert4keras `extend_with_layer_adaptation`;
kexue.fm/archives/7094.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext.numerics import norm
from keras_ext.optimizers import nesting
from keras_ext.optimizers.multipliers import MultiplierOptimizer
from keras_ext.optimizers.selection import Selectable, Selection
from keras_ext.optimizers.update_wrapper import UpdateWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class LayerAdaptiveOptimizer(UpdateWrapper):
    """Make every step of a variable lr times its norm, as LAMB does.

        w <- w + lr ||w|| / ||w' - w|| (w' - w)    if both norms are positive, otherwise w'

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        exclude: variables that take the plain step of the inner optimizer: regular expressions
            searched in `variable.path`, layers, variables, or a list of these. Default: none,
            as in the article and in `keras.optimizers.Lamb`. Google's LAMB for BERT excludes
            biases and layer norms: r"(bias|gamma|beta)$".
        name: name of the wrapper.

    `MultiplierOptimizer` goes outside: inside, the ratio would cancel its multipliers.

    Raises:
        ValueError: there are several learning rates inside (`MultiOptimizer`,
            `PeriodicOptimizer`), or there is a `MultiplierOptimizer`; when built, a part of
            `exclude` matches nothing.

    Example:
        >>> lamb = LayerAdaptiveOptimizer(keras.optimizers.AdamW(1e-3), exclude=r"bias$")
        >>> model.compile(lamb, loss="mse")
        >>> history = model.fit(x, y, verbose=0)

    Reference: You et al. 2019, arXiv 1904.00962.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        exclude: Selectable | Sequence[Selectable] | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.exclude = Selection("exclude", exclude)
        nesting.refuse(
            self,
            lambda inner: not nesting.has_one_rate(inner),
            "{kind} {name!r} has no single learning rate to adapt. Put a "
            "LayerAdaptiveOptimizer around each optimizer in it.",
        )
        nesting.refuse(
            self,
            lambda inner: isinstance(inner, MultiplierOptimizer),
            "the trust ratio cancels the multipliers of {name!r} inside. Put the "
            "MultiplierOptimizer outside.",
        )

    def build(self, variables: list) -> None:
        self._excluded = frozenset(self.exclude.indices(variables))
        super().build(variables)

    def rewrites(self, index: int) -> bool:
        return index not in self._excluded

    def before_step(self) -> Any:
        return ops.convert_to_tensor(self.learning_rate)

    def rewrite(self, index: int, old: Any, new: Any, grad: Any, before: Any) -> Any:
        step = new - old
        weight_norm, step_norm = norm(old), norm(step)
        adapt = ops.logical_and(weight_norm > 0, step_norm > 0)
        ratio = ops.cast(before, old.dtype) * weight_norm / ops.where(adapt, step_norm, 1)
        return ops.where(adapt, old + ratio * step, new)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"exclude": self.exclude.config()}
