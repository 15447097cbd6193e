"""Masks against their definitions, pair by pair."""

import numpy as np
import pytest
from keras import ops

from keras_ext.layers import MultiHeadAttention, masks

N = 5


def array(mask):
    return ops.convert_to_numpy(mask)


def pairs(allowed):
    return np.array([[allowed(i, j) for j in range(N)] for i in range(N)])[None]


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (masks.causal(N), lambda i, j: j <= i),
        (masks.window(N, 2), lambda i, j: i - 2 < j <= i),
        (masks.window(N, 2, causal=False), lambda i, j: abs(i - j) < 2),
        (masks.window(N, 9), lambda i, j: j <= i),
        (masks.others(N), lambda i, j: i != j),
        (masks.prefix([3], N), lambda i, j: j <= i or j < 3),
        (masks.prefix([0], N), lambda i, j: j <= i),
        (masks.prefix([N], N), lambda i, j: True),
        (masks.segments([[0, 0, 1, 1, 1]]), lambda i, j: j <= max(i, 1)),
        (masks.segments([[0] * N]), lambda i, j: True),
        (masks.padding(np.array([[7, 0, 1, 0, 0]])), lambda i, j: j in (0, 2)),
    ],
)
def test_equals_the_definition(mask, allowed):
    assert array(mask).dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(array(mask), (1, N, N)), pairs(allowed))


def test_half_of_the_heads_look_ahead():
    mask = array(masks.alternating_heads(3, N))
    back = pairs(lambda i, j: j <= i)[0]
    np.testing.assert_array_equal(mask, np.stack([back, back, back.T])[None])


def test_each_text_has_its_own_prefix():
    mask = array(masks.prefix(np.array([1, 4]), N))
    np.testing.assert_array_equal(mask[1:], pairs(lambda i, j: j <= i or j < 4))
    assert mask.shape == (2, N, N)


def test_combined_masks_of_different_ranks():
    ids = np.array([[7, 8, 0, 0, 0], [7, 8, 9, 0, 0]])
    joined = array(masks.combine(masks.alternating_heads(2, N), None, masks.padding(ids)))
    heads, padding = array(masks.alternating_heads(2, N)), (ids != 0)[:, None, None]
    np.testing.assert_array_equal(joined, heads & padding)
    assert masks.combine(None, None) is None


def test_an_attention_takes_them():
    x = np.random.default_rng(0).normal(size=(1, N, 8)).astype("float32")
    masked, causal = MultiHeadAttention(2, 4), MultiHeadAttention(2, 4, causal=True)
    expected = array(masked(x, x, attention_mask=masks.causal(N)))
    causal.build(x.shape, x.shape)
    causal.set_weights(masked.get_weights())
    np.testing.assert_allclose(array(causal(x, x)), expected, atol=1e-6)


def test_bad_width():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        masks.window(N, 0)
