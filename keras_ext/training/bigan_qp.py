"""BiGAN-QP: generator, encoder and a discriminator of pairs, trained with one loss.

    Delta = T(x, E(x)) - T(G(z), z)
    T maximises    E[Delta - Delta^2 / (2 lambda d)],    d = d(x, G(z)) + d(E(x), z)
    G, E minimise  E[Delta + beta_1 |z - E(sg G(z))|^2 + beta_2 |x - G(sg E(x))|^2]

The game alone makes the pairs (x, E(x)) and (G(z), z) alike in distribution; the two squares
(means over all dimensions) make E and G each other's inverse, a little. As in
`keras_ext.training.gan` both sides share a scalar, T sees each pair once, and the gradients are
those of the two losses, exactly.

Source: Su 2018, arXiv 1811.07296, kexue.fm/archives/6214 (beta_1 = 2, beta_2 = 3 at 128x128
pixels, 4 and 6 at 256x256, two steps of T per step of G and E).
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.gradient_stop import gradient_only
from keras_ext.losses.gan import GANQP
from keras_ext.numerics import cast_up
from keras_ext.training.adversarial_networks import (
    AdversarialNetworks,
    check_arguments,
    regularisation,
)


@keras.saving.register_keras_serializable(package="keras_ext")
class BiGANQP(AdversarialNetworks):
    """A GAN with an encoder, `fit(images)`; `bigan(images)` are their codes.

        Delta = T(x, E(x)) - T(G(z), z), T with a quadratic potential

    Args:
        generator: a built `keras.Model` of one input, the code z, of known shape.
        encoder: a built `keras.Model` from images to codes of that shape.
        discriminator: a built `keras.Model` from [image, code] to a score.
        scale: lambda > 0. Default: 10, for images in [-1, 1].
        norm: "l1" or "l2", of the distance d. Default: "l1".
        code_weight: beta_1 >= 0. Default: 2.
        image_weight: beta_2 >= 0. Default: 3.
        epsilon: added to d. Default: 1e-6.
        seed: of the noise, an integer. Default: None, a random one.

    Raises:
        ValueError: an argument is out of range, the encoder's codes have not the shape of the
            generator's input; or as for `SingleLossGAN`.

    Example:
        >>> z, image = keras.Input((2,)), keras.Input((4,))
        >>> generator = keras.Model(z, keras.layers.Dense(4)(z))
        >>> encoder = keras.Model(image, keras.layers.Dense(2)(image))
        >>> pair = keras.layers.Concatenate()([image, z])
        >>> critic = keras.Model([image, z], keras.layers.Dense(1)(pair))
        >>> bigan = BiGANQP(generator, encoder, critic)
        >>> bigan.compile(optimizer="adam")
        >>> history = bigan.fit(x, verbose=0)

    Reference: Su 2018, arXiv 1811.07296; kexue.fm/archives/6214.
    """

    def __init__(
        self,
        generator: keras.Model,
        encoder: keras.Model,
        discriminator: keras.Model,
        scale: float = 10.0,
        norm: str = "l1",
        code_weight: float = 2.0,
        image_weight: float = 3.0,
        epsilon: float = 1e-6,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, seed, **kwargs)
        self.quadratic = GANQP(scale, norm, epsilon)
        for name, value in (("code_weight", code_weight), ("image_weight", image_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if tuple(encoder.output_shape[1:]) != self.noise_shape:
            raise ValueError(
                f"encoder must give codes of the shape {self.noise_shape} of the generator's "
                f"input, got {tuple(encoder.output_shape[1:])}."
            )
        self.encoder, self.discriminator = encoder, discriminator
        self.code_weight, self.image_weight = code_weight, image_weight
        self.build(encoder.input_shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.encoder(inputs, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        check_arguments(self, y, sample_weight)
        x = ops.convert_to_tensor(x)  # in eager mode an array
        z = self.noise(ops.shape(x)[0])
        codes, images = y_pred, self.generator(z, training=training)

        def difference(
            made: list,
        ) -> tuple[Any, Any]:  # (value, per pair): E Delta with respect to E(x) and G(z)
            codes, images = made
            real = self.discriminator([x, codes], training=training)
            fake = self.discriminator([images, z], training=training)
            delta = cast_up(real) - cast_up(fake)
            return ops.mean(delta), delta

        made = [codes, images]
        if training:
            zero, (mean, delta) = gradient_only(difference, made, has_aux=True)
        else:
            zero, (mean, delta) = 0.0, difference(made)
        distance = self.quadratic.distance(x, images) + self.quadratic.distance(codes, z)
        loss_d = self.quadratic.potential(delta, distance)
        inverse = self._inverse(x, z, codes, images, training)
        self.discriminator_loss.update_state(loss_d)
        self.generator_loss.update_state(mean + inverse)
        loss = loss_d + ops.cast(zero, loss_d.dtype) + inverse
        return (loss + regularisation(self, loss_d.dtype)) / backend.num_replicas()

    def _inverse(self, x: Any, z: Any, codes: Any, images: Any, training: bool) -> Any:
        """beta_1 |z - E(sg G(z))|^2 + beta_2 |x - G(sg E(x))|^2, means."""
        of_images = self.encoder(ops.stop_gradient(images), training=training)
        of_codes = self.generator(ops.stop_gradient(codes), training=training)
        loss = 0.0
        for weight, a, b in (
            (self.code_weight, z, of_images),
            (self.image_weight, x, of_codes),
        ):
            a, b = cast_up(a), cast_up(b)
            loss = loss + weight * ops.mean((a - b) ** 2)
        return loss

    def get_config(self) -> dict[str, Any]:
        networks = {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in ("encoder", "discriminator")
        }
        weights = {"code_weight": self.code_weight, "image_weight": self.image_weight}
        return super().get_config() | networks | self.quadratic.get_config() | weights
