"""Rotary positions and span scores in float64 NumPy, one pair of tokens at a time."""

import numpy as np


def rotation(size, position, base=10_000.0, interleaved=True):
    """The matrix of one position."""
    matrix, half = np.zeros((size, size)), size // 2
    for k in range(half):
        angle = position * base ** (-2 * k / size)
        u, v = (2 * k, 2 * k + 1) if interleaved else (k, k + half)
        matrix[u, u] = matrix[v, v] = np.cos(angle)
        matrix[u, v], matrix[v, u] = -np.sin(angle), np.sin(angle)
    return matrix


def span_scores(query, key, rope=True):
    """(length, heads, size) twice -> (heads, length, length)."""
    length, heads, size = query.shape
    scores = np.zeros((heads, length, length))
    for a, i, j in np.ndindex(scores.shape):
        turn = rotation(size, j - i) if rope else np.eye(size)
        scores[a, i, j] = query[i, a] @ turn @ key[j, a] / np.sqrt(size)
    return scores
