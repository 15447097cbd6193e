"""Normalisation by the root of the mean square.

    y = x / √(mean(x²) + ε) · γ

Of layer normalisation it leaves out the mean and β, and without `scale` γ as well (RoFormerV2).
`keras.layers.RMSNormalization` always has γ.

Source: Zhang & Sennrich 2019, arXiv 1910.07467; kexue.fm/archives/8998.
"""

from typing import Any

import keras
from keras import ops


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
        wide = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        square = ops.mean(ops.square(wide), axis=-1, keepdims=True)
        outputs = wide * ops.rsqrt(square + self.epsilon)
        if self.scale:
            outputs = outputs * ops.cast(self.gamma, outputs.dtype)
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "scale": self.scale}
