"""Gradient clipping: hard, smooth and adaptive, on the gradient that the update really has.

With g the gradient, ||g|| its norm and c the threshold,

    hard        g * min(1, c / ||g||)
    smooth      g * c / (||g|| + c)
    adaptive    G_i * min(1, c * max(||W_i||, 0.001) / ||G_i||)    for each unit i of a weight W

Under (L0, L1)-smoothness, |Hessian| <= L0 + L1 ||g||, the best step of gradient descent is
1 / (L0 + L1 ||g||): smooth clipping with c = L0 / L1 and learning rate 1 / L0. Smooth is at
most hard and at least half of it; the half occurs at ||g|| = c.

Exact: a row of an embedding that occurs several times in a batch counts with its sum (on
TensorFlow, Keras takes the norm before it adds up: a row hit 16 times with gradient 1 has
norm 16, Keras says 4); replicas are summed first; a static loss scale is divided out. Norms are
float32 and do not overflow below 3e38; elements below 1e-19 do not count in them. Cost: the
gradients are read once more, and the first weight waits for the last gradient (not so with
scope="variable" and adaptive, unless steps are skipped).

Source: kexue.fm/archives/7469, Zhang et al. 2020 (arXiv 1905.11881); adaptive: Brock et al.
2021 (arXiv 2102.06171).
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.numerics import all_finite, norm, scaled_norm
from keras_ext.optimizers import nesting
from keras_ext.optimizers.selection import Selectable, Selection
from keras_ext.optimizers.wrapper import OptimizerWrapper

KINDS = ("hard", "smooth", "adaptive")
SCOPES = ("global", "variable")
Scope: TypeAlias = Literal["global", "variable"]
NONFINITE = ("skip", "propagate")

SMALLEST_WEIGHT_NORM = 1e-3  # so that units which start at zero can move

# Kernels (inputs, heads, head_dim) of keras.layers.MultiHeadAttention, which from (kernel
# size, inputs, filters) and (heads, head_dim, outputs) only the name can tell.
HEADS = re.compile(r"(^|/)(query|key|value|gate)/kernel$")


def hard_clip(grads: list, threshold: float, scope: Scope = "global") -> list:
    """g * min(1, c / ||g||); the norm is over all tensors, or over each (scope="variable")."""
    return scaled(grads, [hard_factor(n, threshold) for n in norms(grads, scope)])


def smooth_clip(grads: list, threshold: float, scope: Scope = "global") -> list:
    """g * c / (||g|| + c); the norm is over all tensors, or over each (scope="variable")."""
    return scaled(grads, [smooth_factor(n, threshold) for n in norms(grads, scope)])


def adaptive_clip(grads: list, variables: list, threshold: float) -> list:
    """Each unit's gradient is made no longer than `threshold` times the unit itself."""
    limits = unit_limits(variables, threshold)
    return scaled(grads, map(hard_factor, unit_norms(grads, variables), limits))


def unit_axes(variable: Any) -> tuple[int, ...]:
    """The axes that one unit of a weight extends over: what is summed into one output.

    | weight | unit | axes |
    |---|---|---|
    | at most one axis longer than 1, bias | all of it | all |
    | `embeddings` (tokens, width) | the row of a token, which is used and trained alone | -1 |
    | `query/kernel` ... (inputs, heads, head_dim) | what makes one number of one head | 0 |
    | Dense (inputs, units), attention output (heads, head_dim, outputs), convolution (kernel
      sizes, inputs, filters) | an output | all but the last |

    The same as in optax, but for tables (there a column), rank 3 (there always axis 0) and
    biases of rank 2. Depthwise and transposed convolutions have no name of their own and are
    taken for ordinary ones.
    """
    shape, path = variable.shape, getattr(variable, "path", "")
    every = tuple(range(len(shape)))
    if sum(size > 1 for size in shape) <= 1 or path.endswith("bias"):
        return every
    if path.rpartition("/")[2] == "embeddings":
        return every[-1:]
    return every[:1] if HEADS.search(path) else every[:-1]


@keras.saving.register_keras_serializable(package="keras_ext")
class ClipOptimizer(OptimizerWrapper):
    """Clip the gradient before the wrapped optimizer sees it.

        hard:      g * min(1, c / ||g||)
        smooth:    g * c / (||g|| + c)
        adaptive:  hard for each unit i of a weight W, with c * max(||W_i||, 0.001) for c

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name. Clipping of its own
            (`clipnorm`, ...) acts once more on what is handed to it.
        threshold: c > 0. For "hard" and "smooth" in units of the gradient norm (1 is a common
            choice, L0 / L1 the right one for "smooth"); for "adaptive" a ratio (0.01 to 0.16).
        kind: "hard" (default), "smooth" or "adaptive".
        scope: "global" (default), one norm over all variables; or "variable", one for each. Not
            for "adaptive", whose norms are those of units: see `unit_axes`.
        nonfinite: what to do when a norm is infinite or NaN. "skip" (default): leave out the
            step, as if the batch had not been there, and count it in `skipped`. "propagate":
            all gradients that share the norm become NaN, as with Keras's own clipping.
        exclude: for "adaptive", variables that are not clipped (Brock et al.: the final linear
            layer): regular expressions searched in `variable.path`, layers, variables, or a
            list of these. Default, none.
        name: name of the wrapper.

    Attributes:
        skipped: steps skipped so far.

    `AccumOptimizer(ClipOptimizer(optimizer, c), k)` clips the mean of the micro-batches, as a
    large batch would; `ClipOptimizer(AccumOptimizer(optimizer, k), c)` clips, or skips, each
    of them. A `LossScaleOptimizer` goes outside.

    Raises:
        ValueError: a bad argument, or a `LossScaleOptimizer` inside; when built, a part of
            `exclude` matches nothing.

    Example:
        >>> optimizer = ClipOptimizer(keras.optimizers.Adam(1e-3), 1.0, kind="smooth")
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)

    Reference: kexue.fm/archives/7469; arXiv 1905.11881; adaptive, arXiv 2102.06171.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        threshold: float,
        kind: Literal["hard", "smooth", "adaptive"] = "hard",
        scope: Scope = "global",
        nonfinite: Literal["skip", "propagate"] = "skip",
        exclude: Selectable | Sequence[Selectable] | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.threshold = arguments.number("threshold", threshold, "(0, inf)")
        self.kind = arguments.choice("kind", kind, KINDS)
        self.scope = arguments.choice("scope", scope, SCOPES)
        self.nonfinite = arguments.choice("nonfinite", nonfinite, NONFINITE)
        self.exclude = Selection("exclude", exclude)
        if kind == "adaptive" and scope != "global":
            raise ValueError(
                f'scope must be left out for kind="adaptive", got {scope!r}: its norms are '
                "those of the units of each variable."
            )
        if kind != "adaptive" and self.exclude.parts:
            raise ValueError(
                f"exclude must be left out for kind={kind!r}, got {exclude!r}: only adaptive "
                "clipping looks at one variable at a time."
            )
        nesting.refuse(
            self,
            nesting.scales_loss,
            "the {kind} {name!r} must be outside: inside, scaled gradients would be clipped. "
            "Write LossScaleOptimizer(ClipOptimizer(...)).",
        )

    def build(self, variables: list) -> None:
        self._excluded = frozenset(self.exclude.indices(variables))
        self.skipped = self.add_variable((), dtype="int", name="skipped")
        super().build(variables)

    def update(self, grads: list) -> None:
        chosen = [i for i, g in enumerate(grads) if g is not None and self.is_gradient(i)]
        given = [grads[i] for i in chosen]
        weights = [self.inner_variables[i] for i in chosen]
        adaptive = self.kind == "adaptive"
        found = unit_norms(given, weights) if adaptive else norms(given, self.scope)

        def step() -> None:
            clipped = dict(zip(chosen, self._clip(chosen, given, found), strict=True))
            self.step_inner([clipped.get(i, g) for i, g in enumerate(grads)])

        if self.nonfinite == "propagate":
            step()
            return
        finite = all_finite(found)
        self.skipped.assign_add(ops.cast(ops.logical_not(finite), self.skipped.dtype))
        self.when(finite, step)

    def _clip(self, chosen: list[int], grads: list, norms: list) -> list:
        # clip(s g; s c) = s clip(g; c): so the inner optimizer finds its loss scale s again.
        threshold = self.threshold * (self.loss_scale_factor or 1.0)
        if self.kind != "adaptive":
            factor = {"hard": hard_factor, "smooth": smooth_factor}[self.kind]
            return scaled(grads, [factor(n, threshold) for n in norms])
        limits = unit_limits([self.inner_variables[i] for i in chosen], threshold)
        factors = [
            ops.ones_like(norm) if i in self._excluded else hard_factor(norm, limit)
            for i, norm, limit in zip(chosen, norms, limits, strict=True)
        ]
        return scaled(grads, factors)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "threshold": self.threshold,
            "kind": self.kind,
            "scope": self.scope,
            "nonfinite": self.nonfinite,
            "exclude": self.exclude.config(),
        }


def hard_factor(norm: Any, limit: Any) -> Any:
    """min(1, limit / norm), and NaN for a norm that is not finite."""
    factor = ops.where(norm > limit, limit / norm, ops.ones_like(norm))
    return ops.where(ops.isfinite(norm), factor, math.nan)


def smooth_factor(norm: Any, limit: Any) -> Any:
    return ops.where(ops.isfinite(norm), limit / (norm + limit), math.nan)


def scaled(grads: Sequence, factors: Iterable) -> list:
    """Each gradient times its factor, or all times the only one; rounded once to its dtype."""
    factors = list(factors)
    if len(factors) == 1:
        factors = factors * len(grads)
    return [
        ops.cast(ops.cast(g, f.dtype) * f, g.dtype) for g, f in zip(grads, factors, strict=True)
    ]


def norms(grads: Sequence, scope: str) -> list:
    """The norm of all tensors together, or that of each: a list of one, or of one for each."""
    each = _norms(grads, [None] * len(grads))
    return each if scope == "variable" or not each else [scaled_norm(ops.stack(each))]


def unit_norms(tensors: Sequence, variables: Sequence) -> list:
    """||.|| of every unit, of a shape to be broadcast to the variable's."""
    return _norms(tensors, [unit_axes(v) for v in variables])


def unit_limits(variables: Sequence, threshold: float) -> list:
    # Outside of fit, PyTorch would record what is computed from weights.
    lengths = unit_norms([ops.stop_gradient(v.value) for v in variables], variables)
    smallest = SMALLEST_WEIGHT_NORM
    return [threshold * ops.where(n > smallest, n, ops.full_like(n, smallest)) for n in lengths]


def _norms(tensors: Sequence, axes: Sequence) -> list:
    """Square, sum, root; where that overflows, again with the largest element as unit."""
    if not tensors:
        return []
    dtypes = {keras.backend.standardize_dtype(t.dtype) for t in tensors}
    dtype = "float64" if "float64" in dtypes else "float32"
    tensors = [ops.cast(t, dtype) for t in tensors]

    plain = [norm(t, axis) for t, axis in zip(tensors, axes, strict=True)]
    return ops.cond(
        all_finite(plain),
        lambda: plain,
        lambda: [scaled_norm(t, axis) for t, axis in zip(tensors, axes, strict=True)],
    )
