"""Losses of generative adversarial networks, each in two parts: discriminator and generator.

With r = D(x) for real x, f = D(G(z)), where D is high on what it takes for real:

    name             discriminator minimises               generator minimises
    Hinge            E relu(1 - r) + E relu(1 + f)         -E f
    NonSaturating    E softplus(-r) + E softplus(f)        E softplus(-f)
    Wasserstein      -E r + E f                            -E f
    Relativistic     E softplus(-(r - f))                  E softplus(-(f - r))
    GANQP            E[-(r - f) + (r - f)^2 / (2 lambda d(x, G(z)))]        E(r - f)

A loss is a plain object with the two methods, so that one training loop or one model
(`keras_ext.training.SingleLossGAN`) serves all of them. Scores are pairs by their place in the
batch; E is the mean over the batch, computed in float32 (float64) at least.

Wasserstein needs a Lipschitz discriminator: a `CriticPenalty`, `GradientNormalized`, or
`keras.layers.SpectralNormalization` (not on torch: there Keras overwrites a kernel that the
first of two calls still needs for its gradient). GANQP needs none: at the optimum |r - f| <=
lambda d, so the pair's own distance bounds the slope. Its quadratic term is the
discriminator's alone; in the generator's loss it would reward small distances of pixels, so
G(z) is taken as a constant.

Source: Lim & Ye 2017, arXiv 1705.02894 (hinge); Goodfellow et al. 2014, arXiv 1406.2661;
Arjovsky et al. 2017, arXiv 1701.07875; Jolicoeur-Martineau 2018, arXiv 1807.00734
(relativistic); Su 2018, arXiv 1811.07296 and kexue.fm/archives/6163 (GAN-QP).
"""

from typing import Any

import keras
from keras import ops

from keras_ext.labels import check_shape
from keras_ext.numerics import cast_up


class GANLoss:
    """Base of the losses here; a subclass defines `discriminator` and `generator`."""

    def discriminator(
        self, real: Any, fake: Any, x_real: Any = None, x_fake: Any = None
    ) -> Any:
        """The scalar that the discriminator minimises.

        Args:
            real, fake: scores of the discriminator, (batch, ...), of the same shape.
            x_real, x_fake: what was scored, (batch, ...); only GANQP looks at it.
        """
        raise NotImplementedError

    def generator(self, real: Any, fake: Any) -> Any:
        """The scalar that the generator minimises; its gradient is that to `fake`."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GANLoss":
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_ext")
class Hinge(GANLoss):
    """E relu(1 - r) + E relu(1 + f); the generator minimises -E f.

    Example:
        >>> loss = Hinge()
        >>> float(loss.discriminator(keras.ops.array([2.0]), keras.ops.array([0.5])))
        1.5

    Reference: Lim & Ye 2017, arXiv 1705.02894.
    """

    def discriminator(self, real, fake, x_real=None, x_fake=None):
        real, fake = _scores(real, fake)
        return ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + fake))

    def generator(self, real, fake):
        return -ops.mean(_scores(real, fake)[1])


@keras.saving.register_keras_serializable(package="keras_ext")
class NonSaturating(GANLoss):
    """-E log s(r) - E log(1 - s(f)), s the sigmoid; the generator minimises -E log s(f).

    Example:
        >>> loss = NonSaturating()
        >>> round(float(loss.generator(None, keras.ops.array([0.0]))), 3)
        0.693

    Reference: Goodfellow et al. 2014, arXiv 1406.2661.
    """

    def discriminator(self, real, fake, x_real=None, x_fake=None):
        real, fake = _scores(real, fake)
        return ops.mean(ops.softplus(-real)) + ops.mean(ops.softplus(fake))

    def generator(self, real, fake):
        return ops.mean(ops.softplus(-_scores(real, fake)[1]))


@keras.saving.register_keras_serializable(package="keras_ext")
class Wasserstein(GANLoss):
    """E f - E r, for a Lipschitz discriminator; the generator minimises -E f.

    Example:
        >>> loss = Wasserstein()
        >>> float(loss.discriminator(keras.ops.array([2.0]), keras.ops.array([0.5])))
        -1.5

    Reference: Arjovsky et al. 2017, arXiv 1701.07875.
    """

    def discriminator(self, real, fake, x_real=None, x_fake=None):
        real, fake = _scores(real, fake)
        return ops.mean(fake) - ops.mean(real)

    def generator(self, real, fake):
        return -ops.mean(_scores(real, fake)[1])


@keras.saving.register_keras_serializable(package="keras_ext")
class Relativistic(GANLoss):
    """-E log s(r - f): is this one more real than that one? The generator swaps r and f.

    Args:
        average: compare each score with the mean of the other side, and sum both sides
            (RaGAN), where the default compares pair by pair. Default: False.

    Example:
        >>> loss = Relativistic()
        >>> round(float(loss.generator(keras.ops.array([1.0]), keras.ops.array([1.0]))), 3)
        0.693

    Reference: Jolicoeur-Martineau 2018, arXiv 1807.00734.
    """

    def __init__(self, average: bool = False) -> None:
        self.average = average

    def discriminator(self, real, fake, x_real=None, x_fake=None):
        real, fake = _scores(real, fake)
        if not self.average:
            check_shape("fake", fake, real.shape, "the shape of real")
            return ops.mean(ops.softplus(fake - real))
        real_side = ops.mean(ops.softplus(ops.mean(fake) - real))
        return real_side + ops.mean(ops.softplus(fake - ops.mean(real)))

    def generator(self, real, fake):
        return self.discriminator(fake, real)

    def get_config(self):
        return {"average": self.average}


@keras.saving.register_keras_serializable(package="keras_ext")
class GANQP(GANLoss):
    """GAN with a quadratic potential: no Lipschitz constraint and no vanishing gradient.

        E[-(r - f) + (r - f)^2 / (2 scale d)],    d = d(x, G(z)) per pair

    The generator minimises E(r - f). `scale` (lambda) only multiplies the scores: under Adam
    it is a matter of taste. Two steps of the discriminator per step of the generator are usual.

    Args:
        scale: lambda > 0. Default: 10, for x in [-1, 1].
        norm: "l1", d = mean |x - G(z)|, or "l2", its root mean square. Default: "l2".
        epsilon: added to d. Default: 1e-6.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> loss = GANQP(norm="l1")
        >>> one = keras.ops.ones((2, 1))
        >>> round(float(loss.discriminator(one, -one, 0.2 * one, 0 * one)), 3)
        -1.0

    Reference: Su 2018, arXiv 1811.07296; kexue.fm/archives/6163.
    """

    def __init__(self, scale: float = 10.0, norm: str = "l2", epsilon: float = 1e-6) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}.")
        if norm not in ("l1", "l2"):
            raise ValueError(f'norm must be "l1" or "l2", got {norm!r}.')
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}: d is 0 where G(z) = x.")
        self.scale, self.norm, self.epsilon = scale, norm, epsilon

    def discriminator(self, real, fake, x_real=None, x_fake=None):
        if x_real is None or x_fake is None:
            raise ValueError("GANQP measures a distance: pass x_real and x_fake.")
        real, fake = _scores(real, fake)
        check_shape("fake", fake, real.shape, "the shape of real")
        check_shape("x_fake", x_fake, x_real.shape, "the shape of x_real")
        check_shape("x_real", x_real, (real.shape[0], *x_real.shape[1:]), "pairs, in shape")
        return self.potential(real - fake, self.distance(x_real, x_fake))

    def potential(self, difference: Any, distance: Any) -> Any:
        """E[-difference + difference^2 / (2 scale distance)]; the distance is per pair."""
        distance = ops.cast(self.scale * (distance + self.epsilon), difference.dtype)
        distance = ops.reshape(distance, (-1,) + (1,) * (len(difference.shape) - 1))
        return ops.mean(-difference + difference**2 / (2 * distance))

    def distance(self, a: Any, b: Any) -> Any:
        """d(a, b) per pair, a mean over all dimensions but the first: (batch,). No gradient."""
        a, b = (cast_up(ops.stop_gradient(ops.convert_to_tensor(x))) for x in (a, b))
        axes = tuple(range(1, len(a.shape)))
        if self.norm == "l1":
            return ops.mean(ops.abs(a - b), axis=axes)
        return ops.sqrt(ops.mean((a - b) ** 2, axis=axes))

    def generator(self, real, fake):
        real, fake = _scores(real, fake)
        return ops.mean(real) - ops.mean(fake)

    def get_config(self):
        return {"scale": self.scale, "norm": self.norm, "epsilon": self.epsilon}


def _scores(real: Any, fake: Any) -> list[Any]:
    """In float32 at least; an absent score stays None."""
    return [None if s is None else cast_up(s) for s in (real, fake)]


LOSSES = {
    "hinge": Hinge,
    "non_saturating": NonSaturating,
    "wgan": Wasserstein,
    "relativistic": Relativistic,
    "gan_qp": GANQP,
}


def get(loss: str | GANLoss) -> GANLoss:
    """The loss of that name, or the object itself.

    Raises:
        ValueError: there is no such loss.

    Example:
        >>> from keras_ext.losses import gan
        >>> gan.get("gan_qp").scale
        10.0
    """
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]()
    elif callable(getattr(loss, "discriminator", None)) and callable(
        getattr(loss, "generator", None)
    ):
        return loss
    raise ValueError(
        f"loss must be one of {sorted(LOSSES)}, or an object with the methods discriminator "
        f"and generator such as keras_ext.losses.GANQP(), got {loss!r}."
    )
