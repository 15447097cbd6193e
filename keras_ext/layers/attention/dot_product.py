"""Softmax attention as a function of queries, keys and values, and the masks that it takes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ext.layers.attention.positions import Position
from keras_ext.numerics import LOG_ZERO


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: Callable[[Any], Any] | None = None,
    scale: float | None = None,
    bias: Any = None,
    causal: bool = False,
    position: Position | None = None,
    positions: tuple[Any, Any] = (None, None),
    flash_attention: bool | None = None,
    return_scores: bool = False,
) -> Any:
    """Scaled dot-product attention, all heads at once.

    Args:
        query: (batch, targets, heads, key_dim).
        key: (batch, sources, heads, key_dim).
        value: (batch, sources, heads, value_dim).
        mask: boolean of rank 4, broadcastable to (batch, heads, targets, sources);
            True = attend. None attends everywhere.
        dropout: function applied to the attention weights.
        scale: λ. Default: 1/√key_dim.
        bias: added to the scores, of rank 4 as `mask`.
        causal: the i-th query sees the first i keys only.
        position: that has encoded queries and keys; it scores and sums them. Default: none.
        positions: of the queries ([batch,] targets) and of the keys ([batch,] sources), for
            `position`.
        flash_attention: as of `keras.ops.dot_product_attention`, where that computes the
            outputs. Default: None, if possible.
        return_scores: give the weights too, before dropout. Default: False.

    Returns:
        (batch, targets, heads, value_dim) in the dtype of `value`; with `return_scores` also
        the weights (batch, heads, targets, sources).

    Example:
        >>> q = k = v = keras.random.normal((2, 5, 4, 8))
        >>> tuple(dot_product_attention(q, k, v).shape)
        (2, 5, 4, 8)
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    position = position or Position()
    order = None
    if causal:
        order = ops.arange(ops.shape(query)[1])[:, None] >= ops.arange(ops.shape(key)[1])
    if causal and mask is not None:
        mask, causal = ops.logical_and(mask, order), False
    same_size = query.shape[-1] == value.shape[-1]  # as JAX wants them
    plain = same_size and dropout is None and bias is None and position.only_encodes
    if plain and not return_scores:
        seen = mask
        if causal and keras.backend.backend() == "tensorflow":  # LiteRT cannot run `is_causal`
            seen, causal = ops.expand_dims(order, (0, 1)), False
        outputs = ops.dot_product_attention(
            query,
            key,
            value,
            mask=seen,
            scale=scale,
            is_causal=causal,
            flash_attention=flash_attention,
        )
    else:
        scores = position.scores(query * scale, key, *positions)
        if bias is not None:
            scores = scores + ops.cast(bias, scores.dtype)
        if causal or mask is not None:
            scores = ops.where(order if mask is None else mask, scores, LOG_ZERO)
        weights = ops.cast(ops.softmax(scores), value.dtype)  # (batch, heads, targets, sources)
        kept = weights if dropout is None else dropout(weights)
        outputs = position.outputs(kept, value, *positions)
    if mask is not None:
        attends = ops.any(mask, axis=-1, keepdims=True)  # (batch, heads, targets, 1)
        outputs = ops.where(ops.transpose(attends, (0, 2, 1, 3)), outputs, 0.0)
        if return_scores:
            weights = ops.where(attends, weights, 0.0)
    return (outputs, weights) if return_scores else outputs


def log_scaled(
    query: Any,
    key: Any,
    log_length: int,
    mask: Any = None,
    causal: bool = False,
    least: int = 1,
) -> Any:
    """Queries times log_N(n), for n tokens that each of them attends to.

    Args:
        query, key, mask, causal: as in `dot_product_attention`.
        log_length: N.
        least: n is at least this. Default: 1.

    Returns: like `query`.
    """
    targets, sources = ops.shape(query)[1], ops.shape(key)[1]
    seen = ops.ones((1, 1, targets, sources), "bool") if mask is None else mask
    if causal:
        order = ops.arange(targets)[:, None] >= ops.arange(sources)
        seen = ops.logical_and(seen, order)
    number = ops.sum(ops.cast(seen, "float32"), -1, keepdims=True)
    number = ops.transpose(number, (0, 2, 1, 3))  # (batch, targets, heads, 1)
    factor = ops.log(ops.maximum(number, float(least))) / math.log(log_length)
    return query * ops.cast(factor, query.dtype)


def of_rank_4(name: str, pattern: Any) -> Any:
    rank = len(pattern.shape)
    if rank not in (3, 4):
        raise ValueError(
            f"{name} must have the shape (batch, targets, sources) or (batch, heads, targets, "
            f"sources), got {tuple(pattern.shape)}. One for all texts: {name}[None]. "
            "Padding is a Keras mask, or of the shape (batch, 1, sources)."
        )
    return ops.expand_dims(pattern, 1) if rank == 3 else pattern


def join_masks(source_mask: Any, *attention_masks: Any) -> Any:
    """One mask of rank 4 from padding and patterns, or None; each of them may be None."""
    given = [ops.cast(m, "bool") for m in attention_masks if m is not None]
    masks = [of_rank_4("attention_mask", m) for m in given]
    if source_mask is not None:
        masks.append(ops.expand_dims(ops.cast(source_mask, "bool"), (1, 2)))
    return functools.reduce(ops.logical_and, masks) if masks else None
