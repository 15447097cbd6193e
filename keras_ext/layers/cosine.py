"""Cosine classifier: one learned direction per class, without length or bias.

    y_i = cos(x, w_i) = x · w_i / (|x| |w_i|)

Margin softmax (`keras_ext.losses`) is trained on these cosines. Argmax needs neither scale nor
margin, so accuracy is read off the layer as it is.

Exact, also for lengths far from one: squares are summed in float32 at least. A zero vector has
cosine 0 to everything and gets no gradient. The normalised matrix is never formed: the product
is divided by the lengths afterwards, which saves two passes over the weights.

Cost: the product, 2 · batch · dim · units, and one pass over the weights.

Source: kexue.fm/archives/5743; Wang et al. 2017 (NormFace), arXiv 1704.06369.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.numerics import at_least_float32, guarded


def cosine_scores(features: Any, kernel: Any, dtype: str | None = None) -> Any:
    """Cosines between feature vectors and the columns of a matrix.

    Args:
        features: (..., dim).
        kernel: (dim, units).
        dtype: of the product and of the result; lengths are computed in float32 at least.
            Default: that of `features`.

    Returns: (..., units).

    Example:
        >>> cosines = cosine_scores(np.array([[2.0, 0.0]]), np.array([[3.0], [0.0]]))
        >>> keras.ops.convert_to_numpy(cosines).tolist()
        [[1.0]]
    """
    dtype = dtype or keras.backend.standardize_dtype(features.dtype)
    wide = at_least_float32(dtype)
    features, lengths = ops.cast(features, wide), ops.cast(kernel, wide)
    features = features * _inverse_norm(features, axis=-1)
    products = ops.matmul(ops.cast(features, dtype), ops.cast(kernel, dtype))
    return ops.cast(ops.cast(products, wide) * _inverse_norm(lengths, axis=0), dtype)


@keras.saving.register_keras_serializable(package="keras_ext")
class CosineDense(keras.layers.Layer):
    """A `Dense` layer of cosines: class scores in [-1, 1].

        y_i = x · w_i / (|x| |w_i|)

    In bfloat16 cosines near one are 0.004 apart, which a scale of 30 makes 0.12. In a model
    with mixed precision give this layer `dtype="float32"`, as any layer before a loss.

    Args:
        units: number of classes.
        kernel_initializer: of the class directions. Default: "glorot_uniform".
        kernel_regularizer: Default: None.

    Call arguments:
        inputs: (..., dim). The output is (..., units).

    Raises:
        ValueError: `units` is not positive.

    Example:
        >>> cosines = CosineDense(10)(model.layers[0].output)
        >>> classifier = keras.Model(model.inputs, cosines)
        >>> classifier.compile("adam", AMSoftmax(), metrics=["accuracy"])
    """

    def __init__(
        self,
        units: int,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if units < 1:
            raise ValueError(f"units must be positive, got {units}.")
        self.supports_masking = True
        self.units = units
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build(self, inputs_shape: tuple) -> None:
        self.kernel = self.add_weight(
            shape=(inputs_shape[-1], self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            autocast=False,  # its lengths are those of the float32 weights
            name="kernel",
        )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: inputs_shape[-1]})

    def call(self, inputs: Any) -> Any:
        return cosine_scores(inputs, self.kernel, self.compute_dtype)

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return (*inputs_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


def _inverse_norm(vectors: Any, axis: int) -> Any:
    """1 / |v|, and 0 for a zero vector, where the gradient is zero instead of infinite."""
    return guarded(ops.rsqrt, _squared_norm(vectors, axis))


def _squared_norm(vectors: Any, axis: int) -> Any:
    """|v|² with its dimension kept. The gradient is 2v times a scalar, in one pass over v.

    TensorFlow's own takes four, and for many classes these passes cost more than the product.
    """

    @ops.custom_gradient
    def squared_norm(vectors):
        def gradient(*args, upstream=None):  # PyTorch alone gives it by name
            upstream = args[0] if upstream is None else upstream
            return 2 * upstream * vectors

        return ops.sum(ops.square(vectors), axis=axis, keepdims=True), gradient

    return squared_norm(vectors)
