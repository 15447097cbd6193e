"""Ranks of attention weights: known matrices, and what the article's claim comes to."""

import math

import numpy as np
import pytest

from keras_ext.analysis import attention_rank

RNG = np.random.default_rng(0)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_known_matrices():
    matrices = np.stack([np.eye(4), np.full((4, 4), 0.25), np.diag([3.0, 1, 0, 0])])
    rank = attention_rank(matrices)
    np.testing.assert_array_equal(rank.numeric, [4, 1, 2])
    third = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(rank.effective, [4, 1, third], rtol=1e-6)
    np.testing.assert_allclose(rank.stable, [4, 1, 10 / 9], rtol=1e-6)
    np.testing.assert_allclose(rank.log_determinant[0], 0, atol=1e-12)
    assert rank.log_determinant[2] == -np.inf


def test_the_determinant_of_causal_softmax_is_that_of_its_diagonal():
    n = 40
    scores = np.where(np.tri(n, dtype=bool), RNG.normal(size=(2, n, n)), -np.inf)
    weights = softmax(scores)
    expected = np.log(np.diagonal(weights, axis1=-2, axis2=-1)).sum(-1)
    np.testing.assert_allclose(attention_rank(weights).log_determinant, expected, rtol=1e-6)
    uniform = attention_rank(softmax(np.where(np.tri(n, dtype=bool), 0.0, -np.inf)))
    np.testing.assert_allclose(uniform.log_determinant, -math.lgamma(n + 1), rtol=1e-9)


def test_linear_attention_has_the_rank_of_its_features():
    n, size = 48, 6
    query, key = np.exp(RNG.normal(size=(2, n, size)))
    weights = query @ key.T
    both = attention_rank(weights / weights.sum(-1, keepdims=True))
    causal = weights * np.tri(n)
    one = attention_rank(causal / causal.sum(-1, keepdims=True))
    assert (both.numeric, one.numeric) == (size, n)


def test_softmax_attention_is_of_full_rank_in_both_directions():
    n, size = 128, 16
    scores = RNG.normal(size=(n, size)) @ RNG.normal(size=(size, n)) / np.sqrt(size)
    both = attention_rank(softmax(scores))
    causal = attention_rank(softmax(np.where(np.tri(n, dtype=bool), scores, -np.inf)))
    assert both.numeric == n
    assert causal.effective < both.effective


def test_only_square_matrices():
    with pytest.raises(ValueError, match=r"square matrices, got shape \(2, 3\)"):
        attention_rank(np.ones((2, 3)))
