"""What the models of several networks share that train against each other."""

from typing import Any

import keras
from keras import ops


class AdversarialNetworks(keras.Model):
    """Base of the models that own several networks, `SingleLossGAN` and `BiGANQP`.

    They share the noise for the generator, the averages of the two losses, and how they are
    saved.
    The arguments of a subclass that hold objects have to be in `OBJECTS`.
    """

    OBJECTS = ("generator", "discriminator", "encoder", "loss", "penalty")

    def __init__(self, generator: keras.Model, seed: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        inputs = getattr(generator, "inputs", None)
        shapes = inputs and [tuple(i.shape) for i in inputs]
        if not shapes or len(shapes) > 1 or None in shapes[0][1:]:
            raise ValueError(
                f"generator must have one input of known shape, got inputs={shapes}. Build it "
                "from keras.Input((128,)), say."
            )
        self.generator = generator
        self.noise_shape = shapes[0][1:]
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.discriminator_loss = keras.metrics.Mean(name="discriminator_loss")
        self.generator_loss = keras.metrics.Mean(name="generator_loss")

    def build(self, input_shape: Any) -> None:
        """The networks are built; this tells Keras so."""

    def noise(self, batch: Any) -> Any:
        """Standard normal, (batch, *noise_shape)."""
        return keras.random.normal((batch, *self.noise_shape), seed=self.seed_generator)

    def generate(self, count: int, batch_size: int = 256) -> Any:
        """`count` new images as a NumPy array."""
        noise = ops.convert_to_numpy(self.noise(count))
        return self.generator.predict(noise, batch_size=batch_size, verbose=0)

    def save_own_variables(self, store: Any) -> None:
        # Keras does not save the state of seeds: a resumed training would draw old noise again.
        store["seed_state"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store: Any) -> None:
        self.seed_generator.state.assign(store["seed_state"])

    def get_config(self) -> dict[str, Any]:
        return {
            "generator": keras.saving.serialize_keras_object(self.generator),
            "seed": self.seed_generator.get_config()["seed"],
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        for key in cls.OBJECTS:
            if config.get(key) is not None:
                config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


def check_arguments(model: keras.Model, y: Any, sample_weight: Any) -> None:
    """A GAN learns from images alone, and its losses belong to its constructor."""
    if y is not None or sample_weight is not None:
        what = "targets" if y is not None else "sample weights"
        raise ValueError(f"{type(model).__name__} has no use for {what}. Call fit(images).")
    if model.loss is not None:
        raise ValueError(
            f"{type(model).__name__} takes its loss in the constructor, got compile("
            f"loss={model.loss!r})."
        )


def regularisation(model: keras.Model, dtype: str) -> Any:
    """The sum of the weight regularisers."""
    return sum((ops.cast(ops.sum(loss), dtype) for loss in model.losses), 0.0)
