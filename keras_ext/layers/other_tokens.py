"""The mask that hides from each token itself, as a layer of a functional model."""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention import masks


@keras.saving.register_keras_serializable(package="keras_ext")
class OtherTokens(keras.layers.Layer):
    """What tokens see that see all but themselves: `masks.others` of their number.

    Call arguments:
        inputs: (batch, length, ...), of which the length counts.

    Returns: boolean (1, length, length), the `attention_mask` of blocks.

    Example:
        >>> seen = OtherTokens()(np.zeros((2, 3, 8)))
        >>> keras.ops.convert_to_numpy(seen)[0].astype(int).tolist()
        [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        return masks.others(ops.shape(inputs)[1])

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((1, inputs.shape[1], inputs.shape[1]), dtype="bool")
