"""The mask of a UniLM as a layer of a functional model."""

from typing import Any

import keras

from keras_ext.layers.attention import masks


@keras.saving.register_keras_serializable(package="keras_ext")
class PrefixMask(keras.layers.Layer):
    """What tokens of a UniLM see: `masks.segments` of their segment ids.

    Call arguments:
        segment_ids: integers (batch, length), 0 or 1.

    Returns: boolean (batch, length, length), the `attention_mask` of blocks.

    Example:
        >>> seen = PrefixMask()(np.array([[0, 0, 1]]))
        >>> keras.ops.convert_to_numpy(seen)[0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    def call(self, segment_ids: Any) -> Any:
        return masks.segments(segment_ids)

    def compute_output_spec(self, segment_ids: Any) -> keras.KerasTensor:
        length = segment_ids.shape[1]
        return keras.KerasTensor((segment_ids.shape[0], length, length), dtype="bool")
