"""Keras masks, given to hidden states or taken from them."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_ext")
class WithMask(keras.layers.Layer):
    """Hidden states with another Keras mask, or with none.

    For states that come through an input of a model, or where the padding of an embedding is
    no padding, such as the first token of a T5's decoder.

    Call arguments:
        inputs: (batch, length, ...) for no mask, or a list of that and the mask, boolean
            (batch, length), True = real. The output is like the first.

    Example:
        >>> hidden, mask = np.ones((1, 3, 8), "float32"), np.array([[True, True, False]])
        >>> pooled = keras.layers.GlobalAveragePooling1D()(WithMask()([hidden, mask]))
    """

    def call(self, inputs: Any) -> Any:
        return ops.copy(_states(inputs))  # as the old one keeps its mask

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return inputs[1] if isinstance(inputs, (list, tuple)) else None

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        states = _states(inputs)
        return keras.KerasTensor(states.shape, states.dtype)


def _states(inputs: Any) -> Any:
    return inputs[0] if isinstance(inputs, (list, tuple)) else inputs
