"""What takes the place of the true class's cosine in margin softmax: ψ(cos θ), five margins.

Functions of the cosine, which is what a classifier computes. θ itself would need acos, whose
gradient is infinite at cosine ±1; here all gradients are finite. Angles are in radians.

Used by, and explained in, `margin_softmax.py`.
"""

import math
from typing import Any

from keras import ops

from keras_ext.numerics import guarded


def am_target(cosine: Any, margin: float = 0.35) -> Any:
    """ψ = cos θ - m."""
    return cosine - margin


def arc_target(cosine: Any, margin: float = 0.5, easy_margin: bool = False) -> Any:
    """ψ = cos(θ + m) as long as θ + m <= π; beyond, cos θ - m sin m.

    With `easy_margin`, ψ = cos(θ + m) for θ < π/2; beyond, cos θ.
    """
    shifted = cosine * math.cos(margin) - _sine(cosine) * math.sin(margin)
    if easy_margin:
        return ops.where(cosine > 0, shifted, cosine)
    beyond = cosine - margin * math.sin(margin)
    return ops.where(cosine >= -math.cos(margin), shifted, beyond)


def a_target(cosine: Any, margin: int = 4) -> Any:
    """ψ = (-1)^k cos(mθ) - 2k with k = floor(mθ/π), continuous and falling in θ."""
    # cos(nθ) is a polynomial in cos θ: cos((n+1)θ) = 2 cos θ cos(nθ) - cos((n-1)θ).
    before, multiple = ops.ones_like(cosine), cosine
    for _ in range(margin - 1):
        before, multiple = multiple, 2 * cosine * multiple - before
    folds = ops.zeros_like(cosine)
    for fold in range(1, margin):
        folds = folds + ops.cast(cosine < math.cos(fold * math.pi / margin), cosine.dtype)
    return _fold(multiple, folds)


def simple_a_target(cosine: Any) -> Any:
    """ψ = min(cos 4θ, cos θ): a margin for θ < 72° and 120° < θ < 144°, none elsewhere."""
    fourfold = 8 * cosine**4 - 8 * cosine**2 + 1
    return ops.where(fourfold < cosine, fourfold, cosine)  # ops.minimum rounds to float32


def combined_target(cosine: Any, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2) -> Any:
    """ψ = (-1)^k cos(φ) - 2k - m3 with φ = m1 θ + m2, k = floor(φ/π)."""
    angle = m1 * ops.arctan2(_sine(cosine), cosine) + m2
    return _fold(ops.cos(angle), ops.floor(angle / math.pi)) - m3


def _sine(cosine: Any) -> Any:
    """sin θ, exact to rounding near θ = 0 too; its gradient is 0 where it would be infinite."""
    return guarded(ops.sqrt, (1 - cosine) * (1 + cosine))  # cosines may exceed 1 by rounding


def _fold(cosine: Any, folds: Any) -> Any:
    """(-1)^k cos φ - 2k: the cosine, reflected at each multiple k of π so that it falls on."""
    odd = folds - 2 * ops.floor(folds / 2)
    return (1 - 2 * odd) * cosine - 2 * folds
