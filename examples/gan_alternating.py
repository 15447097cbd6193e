"""The ordinary way to train a GAN, to compare with: two losses, two optimizers, in turn.

A step updates the discriminator on real and generated images, then makes new images and scores
and updates the generator through the new discriminator. Written for TensorFlow, as such steps
are; `keras_ext.training.SingleLossGAN` needs none of it.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_ext.losses.gan import GANLoss, Relativistic


class AlternatingGAN(keras.Model):
    """Trained by `compile(optimizer_d, optimizer_g)` and `fit(images)`."""

    def __init__(
        self,
        generator: keras.Model,
        discriminator: keras.Model,
        loss: GANLoss,
        penalty: Callable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.gan_loss, self.penalty = loss, penalty
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.noise_shape = generator.input_shape[1:]

    def compile(self, optimizer_d, optimizer_g, **kwargs):
        super().compile(**kwargs)
        self.optimizer_d, self.optimizer_g = optimizer_d, optimizer_g

    def call(self, images, training=False):
        return self.discriminator(images, training=training)

    def noise(self, count):
        return keras.random.normal((count, *self.noise_shape), seed=self.seed_generator)

    def generate(self, count):
        return self.generator.predict(self.noise(count).numpy(), batch_size=256, verbose=0)

    def train_step(self, data):
        images, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        batch = tf.shape(images)[0]
        made = self.generator(self.noise(batch), training=True)
        with tf.GradientTape() as tape:
            real = self.discriminator(images, training=True)
            fake = self.discriminator(made, training=True)
            loss_d = self.gan_loss.discriminator(real, fake, images, made)
            if self.penalty is not None:
                loss_d += self.penalty(self.discriminator, images, made, self.seed_generator)
        self._update(self.optimizer_d, tape, loss_d, self.discriminator)

        noise = self.noise(batch)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([w.value for w in self.generator.trainable_weights])
            fake = self.discriminator(self.generator(noise, training=True), training=True)
            if isinstance(self.gan_loss, Relativistic):  # elsewhere only a constant
                real = self.discriminator(images, training=True)
            loss_g = self.gan_loss.generator(real, fake)
        self._update(self.optimizer_g, tape, loss_g, self.generator)
        return {"discriminator_loss": loss_d, "generator_loss": loss_g}

    @staticmethod
    def _update(optimizer, tape, loss, network):
        weights = network.trainable_weights
        optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)
