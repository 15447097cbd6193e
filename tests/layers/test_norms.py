import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.layers import ConditionalLayerNormalization, RMSNorm

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")


@pytest.mark.parametrize("scale", [True, False])
def test_formula(scale):
    layer = RMSNorm(epsilon=0.5, scale=scale)
    layer.build(X.shape)
    gamma = np.arange(8.0) if scale else 1
    layer.set_weights([gamma] if scale else [])
    wide = X.astype("float64")
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5) * gamma
    np.testing.assert_allclose(ops.convert_to_numpy(layer(X)), expected, atol=1e-6)


def test_zeros_and_large_numbers_in_half_precision():
    """The square of 1000 is infinite in float16."""
    layer = RMSNorm(scale=False, dtype="float16")
    x = np.stack([np.zeros(4), np.full(4, 1000.0)]).astype("float16")
    outputs = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(outputs, [[0] * 4, [1] * 4], atol=1e-3)


def test_equals_the_one_of_keras():
    other = keras.layers.RMSNormalization(epsilon=1e-6)
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(layer(X)) for layer in (RMSNorm(), other)), atol=1e-6
    )


def test_conditional_formula():
    rng = np.random.default_rng(1)
    layer, condition = ConditionalLayerNormalization(0.1), rng.normal(size=(2, 4))
    layer.build(X.shape, condition.shape)
    gamma, beta, to_gamma, to_beta = weights = [rng.normal(size=w.shape) for w in layer.weights]
    layer.set_weights(weights)
    wide = X.astype("float64")
    wide -= wide.mean(-1, keepdims=True)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1)
    for text in range(2):
        scale = gamma + condition[text] @ to_gamma
        expected = normal[text] * scale + beta + condition[text] @ to_beta
        outputs = ops.convert_to_numpy(layer(X, condition.astype("float32")))[text]
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
