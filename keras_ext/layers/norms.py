"""Normalisation by the root of the mean square, and layer normalisation under a condition.

    RMS:          y = x / √(mean(x²) + ε) · γ
    conditional:  y = (x - mean(x)) / √(var(x) + ε) · (γ + c W_γ) + β + c W_β

Of layer normalisation RMS leaves out the mean and β, and without `scale` γ as well
(RoFormerV2). `keras.layers.RMSNormalization` always has γ.

Under a condition c, such as the embedding of a label, γ and β depend on it. W_γ and W_β are
zero at first, so that a trained model starts with what it computed without.

Source: Zhang & Sennrich 2019, arXiv 1910.07467; kexue.fm/archives/8998; conditional:
kexue.fm/archives/7124.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.numerics import at_least_float32, cast_up


@keras.saving.register_keras_serializable(package="keras_ext")
class RMSNorm(keras.layers.Layer):
    """Divide vectors by the root of their mean square.

    Computed in float32 at least. Weight: `gamma`, none without `scale`.

    Args:
        epsilon: ε. Default: 1e-6.
        scale: multiply by γ. Default: True.

    Call arguments:
        inputs: (..., width). The output is like it.

    Example:
        >>> [round(float(x), 4) for x in RMSNorm(scale=False)(np.array([[3.0, 4.0]]))[0]]
        [0.8485, 1.1314]

    Reference: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, epsilon: float = 1e-6, scale: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.epsilon = epsilon
        self.scale = scale

    def build(self, inputs_shape: tuple) -> None:
        if self.scale:
            self.gamma = self.add_weight(
                shape=(inputs_shape[-1],), initializer="ones", name="gamma"
            )

    def call(self, inputs: Any) -> Any:
        wide = cast_up(inputs)
        square = ops.mean(ops.square(wide), axis=-1, keepdims=True)
        outputs = wide * ops.rsqrt(square + self.epsilon)
        if self.scale:
            outputs = outputs * ops.cast(self.gamma, outputs.dtype)
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "scale": self.scale}


@keras.saving.register_keras_serializable(package="keras_ext")
class ConditionalLayerNormalization(keras.layers.Layer):
    """Layer normalisation whose γ and β depend on a condition.

    Computed in float32 at least. Weights: `gamma` and `beta` as those of a
    `keras.layers.LayerNormalization`, `gamma_kernel` and `beta_kernel` of W_γ and W_β.

    Args:
        epsilon: ε. Default: 1e-12.

    Call arguments:
        inputs: (batch, ..., width). The output is like it.
        condition: c, (batch, features).

    Example:
        >>> layer = ConditionalLayerNormalization()
        >>> tuple(layer(keras.ops.ones((2, 5, 8)), keras.ops.ones((2, 3))).shape)
        (2, 5, 8)

    Reference: kexue.fm/archives/7124.
    """

    def __init__(self, epsilon: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.epsilon = epsilon

    def build(self, inputs_shape: tuple, condition_shape: tuple) -> None:
        width = inputs_shape[-1]
        shape = (condition_shape[-1], width)
        self.gamma = self.add_weight(shape=(width,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(width,), initializer="zeros", name="beta")
        self.gamma_kernel = self.add_weight(
            shape=shape, initializer="zeros", name="gamma_kernel"
        )
        self.beta_kernel = self.add_weight(shape=shape, initializer="zeros", name="beta_kernel")

    def call(self, inputs: Any, condition: Any) -> Any:
        wide = at_least_float32(inputs.dtype)
        x, condition = ops.cast(inputs, wide), ops.cast(condition, wide)
        rows = (-1, *(1,) * (len(inputs.shape) - 2), inputs.shape[-1])

        def conditional(weight: Any, kernel: Any) -> Any:
            products = ops.matmul(condition, ops.cast(kernel, wide))  # (batch, width)
            return ops.reshape(ops.cast(weight, wide) + products, rows)

        x = x - ops.mean(x, axis=-1, keepdims=True)
        x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.epsilon)
        outputs = x * conditional(self.gamma, self.gamma_kernel)
        outputs = outputs + conditional(self.beta, self.beta_kernel)
        return ops.cast(outputs, self.compute_dtype)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask[0] if isinstance(mask, (list, tuple)) else mask

    def compute_output_shape(self, inputs_shape: tuple, condition_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
