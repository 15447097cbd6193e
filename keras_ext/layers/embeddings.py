"""Token, segment and position embeddings of a Transformer.

    x_t = E_token[id_t] + E_segment[segment_t] + E_position[t]

The token table serves a second time as the output matrix of a language model (tied
weights): logits = h E_tokenᵀ.

Source: Devlin et al. 2018, arXiv 1810.04805; Press & Wolf 2016, arXiv 1608.05859.
"""

import json
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_ext.backend import concrete


@keras.saving.register_keras_serializable(package="keras_ext")
class TokenEmbedding(keras.layers.Embedding):
    """A `keras.layers.Embedding` that also maps hidden states back to logits.

        layer(ids) = E[ids],    layer(hidden, reverse=True) = hidden Eᵀ

    Args:
        *args, **kwargs: those of `keras.layers.Embedding`. With `mask_zero=True` padding is
            masked.
        padding_id: the id of padding. Default: 0.
        architecture: of the model that the layer is in, as JSON takes it; nothing is made of
            it here (see `models.family_of`). Default: None.

    Call arguments:
        inputs: integers (batch, length), or with `reverse` (batch, length, output_dim).
        reverse: False gives (batch, length, output_dim), True gives logits (batch, length,
            input_dim). Default: False.

    Example:
        >>> layer = TokenEmbedding(100, 8, mask_zero=True)
        >>> hidden = layer(keras.ops.array([[5, 7, 0]]))
        >>> tuple(layer(hidden, reverse=True).shape)
        (1, 3, 100)
    """

    def __init__(
        self,
        *args: Any,
        padding_id: int = 0,
        architecture: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.padding_id = padding_id
        self.architecture = architecture

    @property
    def architecture(self) -> Any:
        return json.loads(self._architecture)

    @architecture.setter
    def architecture(self, architecture: Mapping[str, Any] | None) -> None:
        # As text, for which Keras does not look into it for layers to track.
        self._architecture = json.dumps(architecture)

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            return super().call(inputs)
        inputs = ops.cast(inputs, self.compute_dtype)
        embeddings = ops.cast(self.embeddings, self.compute_dtype)
        return ops.matmul(inputs, ops.transpose(embeddings))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        # Keras does not say here whether the call was reversed, but only hidden states float.
        if keras.backend.is_float_dtype(inputs.dtype):
            return mask
        return ops.not_equal(inputs, self.padding_id) if self.mask_zero else None

    def compute_output_shape(self, input_shape: tuple, reverse: bool = False) -> tuple:
        if reverse:
            return (*input_shape[:-1], self.input_dim)
        return super().compute_output_shape(input_shape)

    def compute_output_spec(self, inputs: Any, reverse: bool = False) -> keras.KerasTensor:
        shape = self.compute_output_shape(inputs.shape, reverse)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "padding_id": self.padding_id,
            "architecture": self.architecture,
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class SegmentEmbedding(keras.layers.Layer):
    """Add the learned vector of each token's segment.

        y_t = x_t + onehot(segment_t) E

    For a handful of rows the matrix product takes half the time of a lookup, and its gradient
    is dense. That of a lookup repeats each row many times, and the adaptive optimizers of Keras
    on TensorFlow sum the squares of the repetitions where they should square the sum.

    Args:
        num_segments: rows of the table.
        embeddings_initializer: of the table. Default: "uniform".

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        segment_ids: integers (batch, length). In a compiled call, where ids outside the table
            cannot be seen, they add zeros.

    Raises:
        ValueError: `num_segments` is not positive, or an id is outside the table.

    Example:
        >>> layer = SegmentEmbedding(num_segments=2)
        >>> tuple(layer(keras.ops.zeros((1, 3, 8)), keras.ops.array([[0, 0, 1]])).shape)
        (1, 3, 8)
    """

    def __init__(
        self, num_segments: int, embeddings_initializer: Any = "uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_segments < 1:
            raise ValueError(f"num_segments must be positive, got {num_segments}.")
        self.supports_masking = True
        self.num_segments = num_segments
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)

    def build(self, inputs_shape: tuple, segment_ids_shape: tuple) -> None:
        self.embeddings = self.add_weight(
            shape=(self.num_segments, inputs_shape[-1]),
            initializer=self.embeddings_initializer,
            name="embeddings",
        )

    def call(self, inputs: Any, segment_ids: Any) -> Any:
        seen = concrete(segment_ids)
        if (
            seen is not None
            and seen.size
            and not 0 <= seen.min() <= seen.max() < self.num_segments
        ):
            raise ValueError(
                f"segment_ids must be from 0 to {self.num_segments - 1}, the rows of "
                f"{self.name}, got {seen.min()} to {seen.max()}."
            )
        segments = ops.one_hot(segment_ids, self.num_segments, dtype=self.compute_dtype)
        return inputs + ops.matmul(segments, self.embeddings)

    def compute_output_shape(self, inputs_shape: tuple, segment_ids_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_segments": self.num_segments,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_ext")
class PositionEmbedding(keras.layers.Layer):
    """Add one learned vector per position.

        y_t = x_t + P_t,    t = 0 ... length - 1

    Args:
        max_length: rows of the table.
        embeddings_initializer: of the table. Default: "uniform".

    Call arguments:
        inputs: (batch, length, width), length at most `max_length`. The output is like it.
        positions: integers (batch, length) below `max_length`, where tokens stand; the length
            may be greater then. Default: 0 ... length - 1.

    Raises:
        ValueError: `max_length` is not positive, or the inputs are longer.

    Example:
        >>> layer = PositionEmbedding(max_length=512)
        >>> tuple(layer(keras.ops.zeros((2, 128, 64))).shape)
        (2, 128, 64)
    """

    def __init__(
        self, max_length: int, embeddings_initializer: Any = "uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if max_length < 1:
            raise ValueError(f"max_length must be positive, got {max_length}.")
        self.supports_masking = True
        self.max_length = max_length
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)

    def build(self, inputs_shape: tuple, positions_shape: tuple | None = None) -> None:
        self.embeddings = self.add_weight(
            shape=(self.max_length, inputs_shape[-1]),
            initializer=self.embeddings_initializer,
            name="embeddings",
        )

    def call(self, inputs: Any, positions: Any = None) -> Any:
        if positions is not None:
            # A slice, so that the gradient is dense: see `SegmentEmbedding`.
            return inputs + ops.take(self.embeddings[:], positions, axis=0)
        self._check_length(inputs.shape[1])
        # A slice and not a gather: its gradient is one dense copy.
        return inputs + self.embeddings[: ops.shape(inputs)[1]]

    def compute_output_shape(
        self, inputs_shape: tuple, positions_shape: tuple | None = None
    ) -> tuple:
        if positions_shape is None:
            self._check_length(inputs_shape[1])
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "max_length": self.max_length,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }

    def _check_length(self, length: int | None) -> None:
        if length is not None and length > self.max_length:
            raise ValueError(
                f"The inputs have length {length}, but {self.name} has only "
                f"max_length={self.max_length} positions. Truncate the inputs."
            )
