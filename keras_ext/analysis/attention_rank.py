"""How much a matrix of attention weights can tell apart, in four numbers.

    numeric rank      singular values above rounding
    effective rank    exp(-Σ p_i ln p_i),  p_i = σ_i / Σ σ
    stable rank       Σ σ_i² / σ_1²
    ln |det|          of causal softmax Σ ln a_ii, never singular

For linear attention the rank is at most the number of features if it is bidirectional, and full
if it is causal. Softmax attention is of full numeric rank in both forms, and the effective rank
of the bidirectional one is even the higher: "full rank" alone says little about what a decoder
can do.

Source: kexue.fm/archives/9529; effective rank: Roy & Vetterli 2007.
"""

from typing import Any, NamedTuple

import keras
import numpy as np


class AttentionRank(NamedTuple):
    """Arrays with one entry for each matrix."""

    numeric: np.ndarray
    effective: np.ndarray
    stable: np.ndarray
    log_determinant: np.ndarray


def attention_rank(weights: Any) -> AttentionRank:
    """Ranks and the logarithm of |det| of matrices of attention weights, in float64.

    Args:
        weights: (..., n, n), for instance (batch, heads, n, n).

    Returns: an `AttentionRank` of arrays (...).

    Raises:
        ValueError: the matrices are not square.

    Example:
        >>> rank = attention_rank(np.tri(4) / np.arange(1, 5)[:, None])
        >>> int(rank.numeric), round(float(rank.log_determinant), 4)  # -ln 4!
        (4, -3.1781)
    """
    weights = np.asarray(keras.ops.convert_to_numpy(weights), "float64")
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be square matrices, got shape {weights.shape}.")
    singular = np.linalg.svd(weights, compute_uv=False)
    shares = singular / singular.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)
    return AttentionRank(
        numeric=np.linalg.matrix_rank(weights),
        effective=np.exp(entropy),
        stable=(singular**2).sum(-1) / singular[..., 0] ** 2,
        log_determinant=np.linalg.slogdet(weights).logabsdet,
    )
