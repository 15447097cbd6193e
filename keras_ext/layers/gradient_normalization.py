"""Gradient normalisation: a critic divided by its own slope, hence Lipschitz by construction.

With n = ||dD/dx|| for each example, over all dimensions of x:

    GN      D^ = D / (n + |D|)
    GraN    D^ = D n / (n^2 + epsilon)

If D is piecewise linear (ReLU, LeakyReLU), dD/dx is locally constant, and exactly

    GN      ||dD^/dx|| = (n / (n + |D|))^2 <= 1,    |D^| < 1
    GraN    ||dD^/dx|| = n^2 / (n^2 + epsilon) < 1

GN has norm 1 only where D = 0. It does not change when D is multiplied by c > 0, so nothing is
learned of the scale of the last layer; and as |D^| < 1, the hinge never cuts: hinge is then
Wasserstein + 2. Not exact with smooth activations (SiLU exceeds 1), and D^ jumps where a ReLU
switches, the method's weak point.

Cost: D^ is one forward and one backward pass of D, training it about twice that again, for the
discriminator as for the generator; a gradient penalty costs only the former.

Source: Wu et al. 2021, arXiv 2109.02235 (GN); Bhaskara et al. 2022, arXiv 2111.03162 (GraN);
kexue.fm/archives/8757.
"""

import warnings
from typing import Any

import keras
from keras import ops

from keras_ext.layers.every import every_layer
from keras_ext.layers.slopes import refuse_batch_normalization, scores_and_slopes

PIECEWISE_LINEAR = ("linear", "relu", "leaky_relu")


@keras.saving.register_keras_serializable(package="keras_ext")
class GradientNormalized(keras.Model):
    """A critic over its slope, to be used as the discriminator of a `SingleLossGAN`.

        "gn"    D / (n + |D|)
        "gran"  D n / (n^2 + epsilon),    n = ||dD/dx|| per example

    Args:
        critic: a built `keras.Model` from images to one score each, (batch,) or (batch, 1),
            without batch normalisation.
        kind: "gn" or "gran". Default: "gn".
        epsilon: of "gran", > 0. Default: 0.1.

    Warns:
        UserWarning: an activation of the critic is not piecewise linear.

    Raises:
        ValueError: an argument is out of range; the critic normalises over the batch, so that
            a score depends on other examples and has no slope of its own.

    Example:
        >>> critic = GradientNormalized(model)
        >>> bool(keras.ops.max(keras.ops.abs(critic(x))) < 1)
        True

    Reference: Wu et al. 2021, arXiv 2109.02235; Bhaskara et al. 2022, arXiv 2111.03162.
    """

    def __init__(
        self, critic: keras.Model, kind: str = "gn", epsilon: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if kind not in ("gn", "gran"):
            raise ValueError(f'kind must be "gn" or "gran", got {kind!r}.')
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}.")
        refuse_batch_normalization(critic, type(self).__name__)
        for layer in every_layer(critic):
            activation = getattr(layer, "activation", None)
            name = getattr(activation, "__name__", None) or type(activation).__name__
            if activation is not None and name not in PIECEWISE_LINEAR:
                warnings.warn(
                    f"{layer.name} has the activation {name!r}: the slope of the normalised "
                    f"critic is at most 1 only with {', '.join(PIECEWISE_LINEAR)}.",
                    stacklevel=2,
                )
        self.critic, self.kind, self.epsilon = critic, kind, epsilon
        self.build(critic.input_shape)

    @property
    def input_shape(self) -> tuple:
        return self.critic.input_shape

    def build(self, input_shape: Any) -> None:
        """The critic is built; this tells Keras so."""

    def call(self, inputs: Any, training: bool = False) -> Any:
        scores, slopes = scores_and_slopes(self.critic, inputs, training)
        if self.kind == "gn":
            return scores / (slopes + ops.abs(scores))
        return scores * slopes / (slopes**2 + self.epsilon)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return self.critic.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        critic = keras.saving.serialize_keras_object(self.critic)
        return {"critic": critic, "kind": self.kind, "epsilon": self.epsilon, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        critic = keras.saving.deserialize_keras_object(config["critic"], custom_objects)
        return cls(**config | {"critic": critic})
