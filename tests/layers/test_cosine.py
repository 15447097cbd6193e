"""Cosine classifier."""

import keras
import numpy as np
import pytest
from keras import ops
from reference.margin_softmax import cosines

from keras_ext.layers.cosine import CosineDense, cosine_scores

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(3, 2, 5)).astype("float32")
KERNEL = RANDOM.normal(size=(5, 4)).astype("float32")


def layer_with_kernel(**kwargs):
    layer = CosineDense(4, **kwargs)
    layer.build((None, 5))
    layer.set_weights([KERNEL])
    return layer


def test_outputs_are_cosines_of_any_rank():
    layer = layer_with_kernel()
    for features in (FEATURES, FEATURES[:, 0]):
        outputs = ops.convert_to_numpy(layer(features))
        np.testing.assert_allclose(outputs, cosines(features, KERNEL), atol=1e-6)


@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_lengths_do_not_matter(factor):
    outputs = ops.convert_to_numpy(cosine_scores(factor * FEATURES, KERNEL / factor))
    np.testing.assert_allclose(outputs, cosines(FEATURES, KERNEL), atol=1e-6)


def test_lengths_are_taken_in_float32_under_mixed_precision():
    # Squares of 300 and of 1e-5 leave the range of float16.
    layer = layer_with_kernel(dtype="mixed_float16")
    layer.set_weights([300 * KERNEL])
    for factor in (300, 1e-5):
        features = ops.cast(factor * FEATURES, "float16")
        outputs = layer(features)
        assert keras.backend.standardize_dtype(outputs.dtype) == "float16"
        expected = cosines(ops.convert_to_numpy(ops.cast(features, "float32")), KERNEL)
        np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=3e-3)


def test_zero_vectors_have_cosine_zero_and_no_gradient():
    features = keras.Input((5,))
    layer = layer_with_kernel()
    model = keras.Model(features, layer(features))
    kernel = KERNEL.copy()
    kernel[:, 1] = 0
    layer.set_weights([kernel])
    assert not ops.convert_to_numpy(layer(np.zeros((1, 5), "float32"))).any()
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(y * p))
    batch = np.stack([FEATURES[0, 0], np.zeros(5, "float32")])
    model.train_on_batch(batch, np.ones((2, 4), "float32"))
    (after,) = layer.get_weights()
    np.testing.assert_array_equal(after[:, 1], 0)
    # A direction's gradient is orthogonal to it.
    np.testing.assert_allclose(((kernel - after) * kernel).sum(0), 0, atol=1e-6)
    assert np.abs(kernel - after)[:, [0, 2, 3]].min() > 1e-4


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="units must be positive, got 0"):
        CosineDense(0)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 5"):
        layer_with_kernel()(np.zeros((1, 6), "float32"))
