"""Precision and norms at their edges, against float64 NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend, numerics


def array(x):
    return ops.convert_to_numpy(x)


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x, "float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_at_least_float32(dtype):
    expected = "float64" if dtype == "float64" else "float32"
    assert numerics.at_least_float32(dtype) == expected
    assert keras.backend.standardize_dtype(numerics.cast_up(ops.ones(2, dtype)).dtype) == (
        array(ops.ones(2, expected)).dtype.name
    )


@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norms(axis, scale):
    x = (scale * np.random.default_rng(0).normal(size=(3, 4, 2))).astype("float32")
    keepdims = axis is not None
    exact = np.sqrt((x.astype("float64") ** 2).sum(axis, keepdims=keepdims))
    np.testing.assert_allclose(array(numerics.scaled_norm(tensor(x), axis)), exact, rtol=1e-6)
    if scale == 1:
        np.testing.assert_allclose(array(numerics.norm(tensor(x), axis)), exact, rtol=1e-6)
        mean = np.sqrt((x.astype("float64") ** 2).mean(axis, keepdims=keepdims))
        np.testing.assert_allclose(array(numerics.rms(tensor(x), axis)), mean, rtol=1e-6)
    assert array(numerics.scaled_norm(tensor(np.zeros((2, 2))))) == 0


def test_direction_and_its_gradient():
    x = np.array([[3.0, 4.0], [0.0, 0.0]], "float32")
    np.testing.assert_allclose(
        array(numerics.direction(tensor(x))), [[0.6, 0.8], [0, 0]], rtol=1e-6
    )
    _, gradient = backend.value_and_grad(lambda x: ops.sum(numerics.direction(x)[:, 0]))(x)
    np.testing.assert_allclose(array(gradient)[0], [16 / 125, -12 / 125], rtol=1e-5)
    assert np.isfinite(array(gradient)).all()


def test_guarded():
    x = np.array([4.0, 0.0, -1.0], "float32")
    value, gradient = backend.value_and_grad(
        lambda x: (ops.sum(numerics.guarded(ops.sqrt, x)), numerics.guarded(ops.sqrt, x)),
        has_aux=True,
    )(x)
    np.testing.assert_array_equal(array(value[1]), [2, 0, 0])
    np.testing.assert_array_equal(array(gradient), [0.25, 0, 0])


def test_all_finite():
    ones = tensor([1, 1, 1])
    assert array(numerics.all_finite([]))
    assert array(numerics.all_finite([ones, ones]))
    for wrong in (np.nan, np.inf, -np.inf):
        assert not array(numerics.all_finite([ones, tensor([1, wrong])]))


def test_log_zero_is_finite():
    masked = np.full(3, numerics.LOG_ZERO, "float32")
    np.testing.assert_allclose(array(ops.softmax(masked)), 1 / 3, rtol=1e-6)
    assert array(ops.softmax(np.array([0, numerics.LOG_ZERO], "float32")))[1] == 0
