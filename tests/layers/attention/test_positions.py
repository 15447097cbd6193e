"""Rotary positions against rotation matrices, and their invariants."""

import numpy as np
import pytest
from compiled import compiled
from keras import ops
from reference.global_pointer import rotation

from keras_ext.layers import rotary_embedding

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype("float32")


def rotate(*args, **kwargs):
    return ops.convert_to_numpy(compiled(lambda *a: rotary_embedding(*a, **kwargs))(*args))


@pytest.mark.parametrize("interleaved", [True, False])
def test_equals_the_rotation_matrices(interleaved):
    turned = rotate(X, base=100.0, interleaved=interleaved)
    for t in range(5):
        matrix = rotation(8, t, 100.0, interleaved)
        np.testing.assert_allclose(turned[:, t], X[:, t] @ matrix.T, atol=2e-6)


def test_positions_may_be_given_and_differ_between_texts():
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 0, 300, 1]])
    turned = rotate(X, positions)
    np.testing.assert_array_equal(turned[0], rotate(X)[0])
    for t, position in enumerate(positions[1]):
        np.testing.assert_allclose(turned[1, t], X[1, t] @ rotation(8, position).T, atol=1e-4)
    np.testing.assert_array_equal(rotate(X[:, :, 0], positions), turned[:, :, 0])  # no heads


def test_bfloat16_tells_far_positions_apart():
    x = ops.cast(np.tile([1.0, 0.0], (1, 2, 1)), "bfloat16")
    turned = compiled(rotary_embedding)(x, np.array([256, 257]))
    assert turned.dtype == x.dtype
    turned = ops.convert_to_numpy(ops.cast(turned, "float32"))[0, :, 0]
    np.testing.assert_allclose(turned, np.cos([256, 257]), atol=4e-3)


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match=r"must be even, got shape \(1, 2, 3\)"):
        rotary_embedding(np.ones((1, 2, 3)))
