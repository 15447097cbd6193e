"""Draw tokens: by temperature, among the k likeliest, within the nucleus of mass p.

    p_i ∝ exp(logit_i / T)
    top-k: the k largest,    top-p: the largest, until their sum reaches p

The token is the inverse of the distribution function at a uniform number u: the first, from
the likeliest on where they are sorted, at which the sum of the p exceeds u. So the draw is a
function of (logits, u), the same on all backends, compiled or not.

Source: top-k: Fan et al. 2018, arXiv 1805.04833; top-p: Holtzman et al. 2019, arXiv 1904.09751.
"""

from typing import Any

from keras import ops


def sample_tokens(
    logits: Any,
    uniforms: Any,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Any:
    """Draw one token for each row of logits.

    Args:
        logits: (batch, vocabulary); -inf or -1e30 for what must not be drawn.
        uniforms: (batch,) in [0, 1).
        temperature: T. Default: 1.
        top_k: draw among as many. Default: all.
        top_p: draw among the fewest whose probabilities, after top_k, sum to this; at least
            one. Default: all.

    Returns: int32 (batch,).

    Example:
        >>> tokens = sample_tokens(np.log([[0.5, 0.3, 0.2]] * 3), np.array([0.1, 0.6, 0.9]))
        >>> [int(token) for token in tokens]
        [0, 1, 2]
    """
    logits, tokens = logits / temperature, None
    if top_k is not None or top_p is not None:
        size = logits.shape[-1]
        logits, tokens = ops.top_k(logits, size if top_k is None else min(top_k, size))
    p = ops.softmax(logits)
    if top_p is not None:
        p = ops.where(ops.cumsum(p, axis=-1) - p < top_p, p, 0.0)
    below = ops.cumsum(p, axis=-1)
    reached = below <= ops.expand_dims(ops.cast(uniforms, p.dtype), -1) * below[:, -1:]
    place = ops.sum(ops.cast(reached, "int32"), -1)
    # Rounding may put the product at the whole sum, behind the last token that is possible.
    possible = ops.where(p > 0, ops.arange(p.shape[-1], dtype="int32"), 0)
    place = ops.minimum(place, ops.max(possible, axis=-1))
    if tokens is None:
        return place
    return ops.cast(ops.squeeze(ops.take_along_axis(tokens, place[:, None], 1), 1), "int32")
