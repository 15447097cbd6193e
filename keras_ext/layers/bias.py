"""A learned bias alone, for outputs whose kernel stands elsewhere (tied embeddings)."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_ext")
class Bias(keras.layers.Layer):
    """Add one learned number per feature.

        y = x + b,    b = 0 at first

    Call arguments:
        inputs: (..., width). The output is like it.

    Example:
        >>> token_embedding = TokenEmbedding(100, 8)
        >>> hidden = token_embedding(keras.ops.array([[5, 7, 3]]))
        >>> logits = Bias()(token_embedding(hidden, reverse=True))
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, inputs_shape: tuple) -> None:
        self.bias = self.add_weight(shape=inputs_shape[-1:], initializer="zeros", name="bias")

    def call(self, inputs: Any) -> Any:
        return inputs + self.bias

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape
