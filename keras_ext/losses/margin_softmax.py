"""Margin softmax: a classifier whose features are good for ranking too.

Classification only wants z nearer to its own centre: d(z1, c1) < d(z1, c2). Retrieval wants
d(z1, z3) < d(z1, z2) for z3 of the same class and z2 of another. By two triangle inequalities

    d(z1, c1) + d(z3, c1) + d(z2, c2) < d(z1, c2)

is enough: the right class must win by a margin, about the diameter of a class. With cosines c
to the class directions (`keras_ext.layers.CosineDense`), scale s and target t,

    loss = log(1 + Σ_{i≠t} exp(s c_i - s ψ(c_t))),    c_t = cos θ

| loss | ψ | arXiv |
|---|---|---|
| `CosineSoftmax` | cos θ | 1704.06369 |
| `AMSoftmax` (CosFace) | cos θ - m | 1801.05599, 1801.09414 |
| `ArcFace` | cos(θ + m) | 1801.07698 |
| `ASoftmax` (SphereFace) | (-1)^k cos(mθ) - 2k, k = floor(mθ/π) | 1704.08063 |
| `SimpleASoftmax` | min(cos 4θ, cos θ) | kexue.fm/archives/5743 |
| `CombinedMargin` | cos(m1 θ + m2) - m3, folded as in `ASoftmax` | 1801.07698 |

Computed as softplus(logsumexp_{i≠t}(s c_i) - s ψ), exact to rounding however small the loss is.
The sparse form of the articles, which subtracts the target from a log-sum-exp over all classes,
cancels: at s = 30, m = 0.35 it gives -0.03 where the truth is 6e-4.

Choice of s: for probability P of the right class in the best case, s must be at least
(C - 1)/C · ln((C - 1) P/(1 - P)) with C classes (CosFace).

Cost: of the size (batch, classes) the backward pass keeps nothing but the cosines themselves.

Source: kexue.fm/archives/8656, 5743; github.com/bojone/margin-softmax.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext.labels import check_shape, class_numbers, in_range, nan_unless
from keras_ext.losses.base import Loss
from keras_ext.losses.margins import (
    a_target,
    am_target,
    arc_target,
    combined_target,
    simple_a_target,
)
from keras_ext.numerics import LOG_ZERO, at_least_float32, cast_up


def margin_softmax_loss(
    labels: Any, cosines: Any, target_fn: Callable[[Any], Any], scale: float = 30.0
) -> Any:
    """Margin softmax loss of each example.

    Args:
        labels: class numbers (...) or (..., 1), or one-hot (..., classes). Where they are out
            of range, loss and gradient are NaN if `keras_ext.labels` sees no error.
        cosines: (..., classes).
        target_fn: ψ: cosine of the target class (...) -> what takes its place in the softmax.
        scale: s > 0. Default: 30.

    Returns: losses (...), in float32 (float64 for float64 cosines).

    Raises:
        ValueError: the shapes of labels and cosines do not fit, or labels can be seen to be
            out of range.

    Example:
        >>> losses = margin_softmax_loss([0], np.array([[1.0, 1.0]]), lambda cosine: cosine)
        >>> round(float(losses[0]), 4)
        0.6931
    """
    cosines = cast_up(ops.convert_to_tensor(cosines))
    labels = _class_numbers(labels, cosines)
    parts = _target_and_others(labels, cosines, scale)
    losses = ops.softplus(parts[..., 1] - scale * target_fn(parts[..., 0]))
    return nan_unless(labels >= 0, losses)


@keras.saving.register_keras_serializable(package="keras_ext")
class CosineSoftmax(Loss):
    """Softmax cross-entropy of scaled cosines, without a margin; the base of the others.

        loss = log(1 + Σ_{i≠t} exp(s (c_i - ψ(c_t)))),    here ψ(c) = c

    A loss with a margin of its own overrides `target`.

    Args:
        scale: s > 0. Default: 30.
        label_smoothing: only 0, the default: a margin belongs to one true class.
        reduction, name, dtype: as for `keras.losses.Loss`; the computation is in float32 at
            least.

    Call arguments:
        y_true: class numbers (batch,) or (batch, 1), or one-hot (batch, classes), of which
            the largest entry counts.
        y_pred: cosines (batch, classes), from `CosineDense`. More dimensions may lead.

    Raises:
        ValueError: `scale` is not positive, or `label_smoothing` is not 0; in calls, labels
            are out of range (compiled: the loss is NaN), or of another shape.

    Example:
        >>> loss = CosineSoftmax(scale=20)
        >>> round(float(loss(np.array([0]), np.array([[1.0, 1.0]]))), 4)
        0.6931

    Reference: Wang et al. 2017, arXiv 1704.06369.
    """

    def __init__(
        self,
        scale: float = 30.0,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        if label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0, got {label_smoothing}: the margin belongs to "
                "the one true class, and smoothed labels have none. A smaller scale bounds the "
                "confidence as well."
            )
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}.")
        dtype = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
        # Keras casts the labels to this dtype too: bfloat16 has no class number 257.
        super().__init__(name, reduction, at_least_float32(dtype))
        self.scale = scale

    def target(self, cosine: Any) -> Any:
        """ψ: what takes the place of the true class's cosine (...) in the softmax."""
        return cosine

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return margin_softmax_loss(y_true, y_pred, self.target, self.scale)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dtype": self.dtype, "scale": self.scale}


@keras.saving.register_keras_serializable(package="keras_ext")
class AMSoftmax(CosineSoftmax):
    """Additive margin on the cosine (AM-Softmax, CosFace).

        ψ = cos θ - m

    Args:
        margin: m >= 0, in units of the cosine. `adaptive_margin` measures one. Default: 0.35.
        scale: s > 0. Default: 30 (CosFace: 64).
        **kwargs: those of `CosineSoftmax`.

    Raises:
        ValueError: `margin` is negative; see also `CosineSoftmax`.

    Example:
        >>> classifier = keras.Sequential([keras.Input((4,)), CosineDense(3)])
        >>> classifier.compile("adam", AMSoftmax(margin=0.35, scale=30))
        >>> history = classifier.fit(x, np.zeros(32), verbose=0)

    Reference: arXiv 1801.05599, 1801.09414; kexue.fm/archives/5743, 8656.
    """

    def __init__(self, margin: float = 0.35, scale: float = 30.0, **kwargs: Any) -> None:
        super().__init__(scale, **kwargs)
        if not margin >= 0:
            raise ValueError(f"margin must not be negative, got {margin}.")
        self.margin = margin

    def target(self, cosine: Any) -> Any:
        return am_target(cosine, self.margin)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


@keras.saving.register_keras_serializable(package="keras_ext")
class ArcFace(CosineSoftmax):
    """Additive margin on the angle.

        ψ = cos(θ + m) as long as θ + m <= π;  beyond, cos θ - m sin m

    Keeps ψ falling in θ, with a jump from -1 down to -cos m - m sin m at θ = π - m. From
    scratch a large margin may not converge: train with a small one first.

    Args:
        margin: m in radians, 0 <= m < π. Default: 0.5 (28.6 degrees).
        scale: s > 0. Default: 64.
        easy_margin: no margin for θ >= π/2, instead of the above. Default: False.
        **kwargs: those of `CosineSoftmax`.

    Raises:
        ValueError: `margin` is not in [0, π); see also `CosineSoftmax`.

    Example:
        >>> loss = ArcFace(margin=0.5, scale=64)
        >>> bool(loss(np.array([0]), np.array([[1.0, 0.0]])) < 1e-6)
        True

    Reference: Deng et al. 2018, arXiv 1801.07698.
    """

    def __init__(
        self,
        margin: float = 0.5,
        scale: float = 64.0,
        easy_margin: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale, **kwargs)
        if not 0 <= margin < math.pi:
            raise ValueError(f"margin must be in [0, π), in radians, got {margin}.")
        self.margin = margin
        self.easy_margin = easy_margin

    def target(self, cosine: Any) -> Any:
        return arc_target(cosine, self.margin, self.easy_margin)

    def get_config(self) -> dict[str, Any]:
        own = {"margin": self.margin, "easy_margin": self.easy_margin}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_ext")
class ASoftmax(CosineSoftmax):
    """Multiplicative margin on the angle (A-Softmax, SphereFace).

        ψ = (λ cos θ + (-1)^k cos(mθ) - 2k) / (λ + 1),  k = floor(mθ/π)

    The scale is fixed here; the original takes the length of the features for it.

    Args:
        margin: m, an integer >= 1. Default: 4.
        scale: s > 0. Default: 30.
        annealing: λ >= 0, which the original lowers from 1,000 to 5 in training. Default: 0.
        **kwargs: those of `CosineSoftmax`.

    Raises:
        ValueError: `margin` is not a positive integer, or `annealing` is negative; see also
            `CosineSoftmax`.

    Example:
        >>> loss = ASoftmax(margin=4, annealing=5.0)
        >>> loss.get_config()["annealing"]
        5.0

    Reference: Liu et al. 2017, arXiv 1704.08063.
    """

    def __init__(
        self, margin: int = 4, scale: float = 30.0, annealing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(scale, **kwargs)
        if margin != int(margin) or margin < 1:
            raise ValueError(f"margin must be a positive integer, got {margin}.")
        if not annealing >= 0:
            raise ValueError(f"annealing must not be negative, got {annealing}.")
        self.margin = int(margin)
        self.annealing = annealing

    def target(self, cosine: Any) -> Any:
        folded = a_target(cosine, self.margin)
        return (self.annealing * cosine + folded) / (self.annealing + 1)

    def get_config(self) -> dict[str, Any]:
        own = {"margin": self.margin, "annealing": self.annealing}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_ext")
class SimpleASoftmax(CosineSoftmax):
    """A-Softmax with m = 4 in its simple form.

        ψ = min(cos 4θ, cos θ),    cos 4θ = 8 cos⁴θ - 8 cos²θ + 1

    It does not fall in θ everywhere: the margin acts below 72 degrees and between 120 and 144.

    Args:
        scale: s > 0. Default: 30.
        label_smoothing, reduction, name, dtype: as for `CosineSoftmax`.

    Example:
        >>> loss = SimpleASoftmax(scale=30, reduction="sum")
        >>> bool(loss(np.array([0]), np.array([[0.8, 0.8]])) > np.log(2))
        True

    Reference: kexue.fm/archives/5743.
    """

    def target(self, cosine: Any) -> Any:
        return simple_a_target(cosine)


@keras.saving.register_keras_serializable(package="keras_ext")
class CombinedMargin(CosineSoftmax):
    """The three margins together.

        ψ = (-1)^k cos φ - 2k - m3,    φ = m1 θ + m2,  k = floor(φ/π)

    That is cos(m1 θ + m2) - m3 for φ <= π, and beyond the same fold as in A-Softmax, which
    keeps ψ continuous and falling. (1, 0, m) is `AMSoftmax`, (m, 0, 0) is `ASoftmax`; (1, m, 0)
    is `ArcFace` but for θ > π - m.

    Args:
        m1: factor of the angle, m1 > 0. Default: 1.
        m2: added to the angle, in radians, 0 <= m2 < π. Default: 0.3.
        m3: taken off the cosine, m3 >= 0. Default: 0.2.
        scale: s > 0. Default: 64.
        **kwargs: those of `CosineSoftmax`.

    Raises:
        ValueError: a margin is out of its range; see also `CosineSoftmax`.

    Example:
        >>> loss = CombinedMargin(m1=0.9, m2=0.4, m3=0.15)
        >>> loss.get_config()["m2"]
        0.4

    Reference: Deng et al. 2018, arXiv 1801.07698, equation 4.
    """

    def __init__(
        self,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        scale: float = 64.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale, **kwargs)
        if not m1 > 0:
            raise ValueError(f"m1 must be positive, got {m1}.")
        if not 0 <= m2 < math.pi:
            raise ValueError(f"m2 must be in [0, π), in radians, got {m2}.")
        if not m3 >= 0:
            raise ValueError(f"m3 must not be negative, got {m3}.")
        self.m1, self.m2, self.m3 = m1, m2, m3

    def target(self, cosine: Any) -> Any:
        return combined_target(cosine, self.m1, self.m2, self.m3)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "m1": self.m1, "m2": self.m2, "m3": self.m3}


def _class_numbers(labels: Any, cosines: Any) -> Any:
    """Class numbers (...), from themselves, from (..., 1) or from one-hot (..., classes).

    -1 where a label is none, or a row of one-hot labels has no largest entry above 0.
    """
    labels = ops.convert_to_tensor(labels)
    shape, classes = tuple(cosines.shape), cosines.shape[-1]
    if len(labels.shape) == len(shape) and labels.shape[-1] == classes > 1:
        check_shape("labels", labels, shape)
        largest = ops.max(labels, axis=-1, keepdims=True)
        single = ops.sum(ops.cast(ops.equal(labels, largest), "int32"), axis=-1) == 1
        valid = ops.logical_and(single, largest[..., 0] > 0)
        in_range("labels", labels, "one-hot, with one largest entry above 0 in each row", valid)
        return ops.where(valid, ops.cast(ops.argmax(labels, axis=-1), "int32"), -1)
    if len(labels.shape) == len(shape) and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    check_shape(
        "labels", labels, shape[:-1], f"the shape of one-hot {shape} or of class numbers"
    )
    return class_numbers("labels", labels, classes)[0]


def _target_and_others(labels: Any, cosines: Any, scale: float) -> Any:
    """c_t and logsumexp_{i≠t}(s c_i), stacked (..., 2).

    Automatic differentiation would keep the exponentials and the masked logits, both of the
    size of the cosines. This gradient computes them again.
    """
    # An argument with a gradient, so a float: JAX refuses what a function to differentiate
    # closes over.
    labels = ops.expand_dims(ops.cast(labels, cosines.dtype), -1)
    classes = np.arange(cosines.shape[-1], dtype=keras.backend.standardize_dtype(cosines.dtype))

    @ops.custom_gradient
    def parts(cosines, labels):
        def others():  # finite: a single class has no others, and log 0 no gradient
            return ops.where(ops.equal(labels, classes), LOG_ZERO, scale * cosines)

        def gradient(*args, upstream=None):  # PyTorch alone gives it by name
            upstream = args[0] if upstream is None else upstream
            by_target, by_others = upstream[..., :1], upstream[..., 1:]
            by_cosine = scale * by_others * ops.softmax(others(), axis=-1)
            by_cosine = ops.where(ops.equal(labels, classes), by_target, by_cosine)
            return by_cosine, ops.zeros_like(labels)

        target = ops.sum(ops.where(ops.equal(labels, classes), cosines, 0), axis=-1)
        return ops.stack([target, ops.logsumexp(others(), axis=-1)], axis=-1), gradient

    return parts(cosines, labels)
