"""A generative adversarial network trained with one loss: compile, fit, done.

Alternating training takes two losses, two optimizers, and a training step of one's own for
every backend. Here both networks move at every step, at gradients taken at the same weights,
and the scalar that `fit` differentiates is

    L = L_D(D(x), D(sg[G(z)]))  +  <sg[g], G(z) - sg[G(z)]>,    g = dL_G / dG(z)

with sg = stop_gradient. The bracket is zero in value. Its gradient is that of L_G to the
generator, and it does not know the discriminator (`keras_ext.layers.gradient_only`). So

    grad_D L = grad_D L_D,    grad_G L = grad_G L_G    for any pair of losses, exactly.

The source writes the second term as L_G(D(G(z))) - L_G(D(sg[G(z)])): a second forward pass of
D on G(z), which must have the dropout of the first. Here D sees each batch once, and its
backward pass on G(z) runs twice: with the cotangent of L_D to the weights, with that of L_G to
the image. An update of both costs 3 F_G + 7 F_D, in units of one forward pass; alternating,
which makes G(z) and D(G(z)) anew for the generator, costs 4 F_G + 8 F_D. Dropout and noise in
D are as they should be (one draw), and batch normalisation sees one real and one generated
batch.

Not the same as alternating: in alternating training one network answers to the other's last
move, here they move at once. On the bilinear game xy with gradient descent, alternation circles
while simultaneous steps spiral outwards; regularised discriminators do not show it.

No weight of L_G: Adam divides by the size of the gradient, so a weight would do nothing. What
sets the pace of one network against the other is the learning rate,
`MultiplierOptimizer(Adam(2e-4, 0.5), {discriminator: 2.0})`. Several steps of the discriminator
for one of the generator: `keras_ext.optimizers.PeriodicOptimizer`.

Source: kexue.fm/archives/6387; related, Shen et al. 2021, arXiv 2103.00430.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.gradient_stop import gradient_only
from keras_ext.losses import gan as gan_losses
from keras_ext.training.adversarial_networks import (
    AdversarialNetworks,
    check_arguments,
    regularisation,
)


@keras.saving.register_keras_serializable(package="keras_ext")
class SingleLossGAN(AdversarialNetworks):
    """Generator and discriminator in one model, trained by `fit(images)`.

        grad_D L = grad_D L_D,    grad_G L = grad_G L_G,    one L, one optimizer

    `gan(images)` are the scores of the discriminator, `gan.generate(n)` new images. History:
    `discriminator_loss`, `generator_loss`, and `loss`, which is the discriminator's with
    penalty and regularisers.

    Args:
        generator: a built `keras.Model` of one input, the noise, of known shape
            (batch, ...). Noise is standard normal.
        discriminator: a built `keras.Model` from images to scores, high on real ones, without
            a sigmoid.
        loss: "hinge", "non_saturating", "wgan", "relativistic", "gan_qp", or an object of
            `keras_ext.losses` such as `GANQP(norm="l1")`. Default: "hinge".
        penalty: what is added to the discriminator's loss, such as
            `keras_ext.training.CriticPenalty()`, which the loss "wgan" needs (or another way
            to bound the slope, see `keras_ext.losses.Wasserstein`). Default: None.
        seed: of the noise, an integer. Default: None, a random one.

    One optimizer serves both. `global_clipnorm` (and `ClipOptimizer`) therefore clips the norm
    over both networks together; weight decay and `clipnorm` act on each weight. Weight
    regularisers count; activity regularisers and `add_loss` inside of the networks do not.
    Under mixed_float16 the gradient to the image is not scaled: use mixed_bfloat16. Replicas of
    a `tf.distribute` strategy start from one seed, so they draw the same noise.

    Raises:
        ValueError: the generator's input is not one tensor of known shape; fit is given
            targets or sample weights, or compile a loss.

    Example:
        >>> noise, image = keras.Input((2,)), keras.Input((4,))
        >>> generator = keras.Model(noise, keras.layers.Dense(4)(noise))
        >>> gan = SingleLossGAN(generator, keras.Model(image, keras.layers.Dense(1)(image)))
        >>> gan.compile(optimizer="adam")
        >>> history = gan.fit(x, verbose=0)

    Reference: kexue.fm/archives/6387.
    """

    def __init__(
        self,
        generator: keras.Model,
        discriminator: keras.Model,
        loss: str | gan_losses.GANLoss = "hinge",
        penalty: Callable | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, seed, **kwargs)
        self.discriminator = discriminator
        self.gan_loss = gan_losses.get(loss)
        self.penalty = penalty
        self.build(discriminator.input_shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.discriminator(inputs, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        check_arguments(self, y, sample_weight)
        real = y_pred  # the trainer has just called the model
        images = self.generator(self.noise(ops.shape(x)[0]), training=training)
        stopped = ops.stop_gradient(images)

        def generator_loss(images: Any) -> tuple[Any, Any]:
            fake = self.discriminator(images, training=training)
            return self.gan_loss.generator(ops.stop_gradient(real), fake), fake

        if training:
            zero, (loss_g, fake) = gradient_only(generator_loss, images, has_aux=True)
        else:
            zero, (loss_g, fake) = 0.0, generator_loss(stopped)
        loss_d = self.gan_loss.discriminator(real, fake, x, stopped)
        self.discriminator_loss.update_state(loss_d)
        self.generator_loss.update_state(loss_g)
        loss = loss_d + ops.cast(zero, loss_d.dtype) + regularisation(self, loss_d.dtype)
        if self.penalty is not None and training:
            loss = loss + self.penalty(self.discriminator, x, stopped, self.seed_generator)
        return loss / backend.num_replicas()

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "discriminator": keras.saving.serialize_keras_object(self.discriminator),
            "loss": keras.saving.serialize_keras_object(self.gan_loss),
            "penalty": self.penalty and keras.saving.serialize_keras_object(self.penalty),
        }
