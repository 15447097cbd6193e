"""Gradient penalties: what is added to a discriminator's loss to bound its slope.

With n(x) = ||dD/dx|| per example, x_r real, x_f generated, x^ = u x_r + (1 - u) x_f, u uniform:

    "gp"    weight E (n(x^) - 1)^2         Wasserstein GANs
    "lp"    weight E relu(n(x^) - 1)^2     the same, one-sided
    "r1"    weight E n(x_r)^2 / 2          any loss
    "r2"    weight E n(x_f)^2 / 2

Cost: one more batch through D, forward and backward, and the derivative of that. It has no
part in the generator's loss.

Source: Gulrajani et al. 2017, arXiv 1704.00028 (gp); Petzka et al. 2018, arXiv 1709.08894 (lp);
Mescheder et al. 2018, arXiv 1801.04406 (r1, r2); kexue.fm/archives/8757.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.slopes import refuse_batch_normalization, scores_and_slopes
from keras_ext.numerics import cast_up

KINDS = ("gp", "lp", "r1", "r2")


@keras.saving.register_keras_serializable(package="keras_ext")
class CriticPenalty:
    """The `penalty` of a `SingleLossGAN`.

        weight E (||dD/dx|| - 1)^2 between real and generated examples, or a relative of it

    Args:
        weight: > 0. Default: 10.
        kind: "gp", "lp", "r1" or "r2". Default: "gp".

    Call arguments:
        discriminator: a model from examples to one score each, without batch normalisation.
        x_real, x_fake: (batch, ...).
        seed: an integer or a `keras.random.SeedGenerator`, for u. Default: None.

    Raises:
        ValueError: an argument is out of range; when called, the discriminator normalises
            over the batch.

    Example:
        >>> penalty = CriticPenalty(kind="r1")
        >>> (kernel, bias) = model.get_weights()
        >>> value = keras.ops.convert_to_numpy(penalty(model, x, x))
        >>> bool(np.isclose(value, 5 * (kernel**2).sum()))
        True

    Reference: Gulrajani et al. 2017, arXiv 1704.00028.
    """

    def __init__(self, weight: float = 10.0, kind: str = "gp") -> None:
        if not weight > 0:
            raise ValueError(f"weight must be positive, got {weight}.")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        self.weight, self.kind = weight, kind

    def __call__(self, discriminator: Any, x_real: Any, x_fake: Any, seed: Any = None) -> Any:
        refuse_batch_normalization(discriminator, type(self).__name__)
        x_real = ops.cast(x_real, x_fake.dtype)
        if self.kind in ("r1", "r2"):
            x = x_real if self.kind == "r1" else x_fake
        else:
            shape = (ops.shape(x_fake)[0],) + (1,) * (len(x_fake.shape) - 1)
            u = keras.random.uniform(shape, dtype=x_fake.dtype, seed=seed)
            x = u * x_real + (1 - u) * x_fake
        _, slopes = scores_and_slopes(discriminator, ops.stop_gradient(x), training=True)
        slopes = cast_up(slopes)
        if self.kind in ("r1", "r2"):
            return self.weight * ops.mean(slopes**2) / 2
        excess = slopes - 1
        if self.kind == "lp":
            excess = ops.relu(excess)
        return self.weight * ops.mean(excess**2)

    def get_config(self) -> dict[str, Any]:
        return {"weight": self.weight, "kind": self.kind}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CriticPenalty":
        return cls(**config)
