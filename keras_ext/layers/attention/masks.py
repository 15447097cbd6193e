"""Who may attend to whom: boolean masks, True = attend.

All have the rank 3, (batch, targets, sources), or 4 with heads after the batch, sizes of 1
broadcast, as `attention_mask` of `MultiHeadAttention` takes them. They cost n² bits; padding
(`value_mask`), order (`causal=True`) and windows (`window=`) need no mask there.

Masks of language models, for i a target and j a source:

    causal       j <= i                       GPT
    prefix       j <= i or j < prefix         one direction, but the prefix sees itself whole
    segments     s_j <= s_i                   UniLM, s the number of ones among the segment ids

Source: Dong et al. 2019 (UniLM), arXiv 1905.03197; kexue.fm/archives/6933, 9529.
"""

from typing import Any

from keras import ops


def causal(length: Any) -> Any:
    """No token sees later ones: (1, length, length).

    Example:
        >>> ops.convert_to_numpy(masks.causal(3))[0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    position = ops.arange(length)
    return ops.expand_dims(position[:, None] >= position, 0)


def prefix(prefix_lengths: Any, length: Any) -> Any:
    """The first tokens see each other, later ones all before them: (batch, length, length).

    Args:
        prefix_lengths: integers (batch,); 0 is causal, `length` sees everything.
        length: of the texts.
    """
    inside = ops.arange(length) < ops.cast(prefix_lengths, "int32")[:, None]
    return ops.logical_or(causal(length), ops.expand_dims(inside, 1))


def segments(segment_ids: Any) -> Any:
    """Tokens of segment 0 see each other, those of segment 1 all before them (UniLM).

    Args:
        segment_ids: 0 or 1 (batch, length). Padding of segment 0 after a segment 1 counts as
            its last token: join the mask with `padding`.

    Returns: (batch, length, length).
    """
    order = ops.cumsum(ops.cast(segment_ids, "int32"), axis=1)
    return ops.expand_dims(order, 1) <= ops.expand_dims(order, 2)


def window(length: Any, width: int, causal: bool = True) -> Any:
    """A token sees itself and the `width` - 1 before it: (1, length, length).

    Args:
        length: of the texts.
        width: at least 1.
        causal: False lets it see as many after it. Default: True.

    Raises:
        ValueError: `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    distance = ops.arange(length)[:, None] - ops.arange(length)
    least = 0 if causal else 1 - width
    return ops.expand_dims(ops.logical_and(distance < width, distance >= least), 0)


def others(length: Any) -> Any:
    """A token sees all but itself: (1, length, length)."""
    position = ops.arange(length)
    return ops.expand_dims(position[:, None] != position, 0)


def padding(token_ids: Any) -> Any:
    """No token sees padding, id 0: (batch, 1, length)."""
    return ops.expand_dims(ops.not_equal(token_ids, 0), 1)


def alternating_heads(num_heads: int, length: Any) -> Any:
    """Half of the heads look back, the others ahead: (1, num_heads, length, length).

    Source: kexue.fm/archives/9529.
    """
    back = ops.expand_dims(causal(length), 1)
    halves = num_heads - num_heads // 2, num_heads // 2
    ahead = ops.transpose(back, (0, 1, 3, 2))
    return ops.concatenate([back] * halves[0] + [ahead] * halves[1], axis=1)


def combine(*masks: Any) -> Any:
    """What all of the masks allow; None allows everything, and is given if all are None.

    Example:
        >>> token_ids = np.array([[2, 5, 3, 0]])
        >>> mask = masks.combine(masks.causal(4), masks.padding(token_ids))
        >>> tuple(mask.shape)
        (1, 4, 4)
    """
    given = [ops.cast(mask, "bool") for mask in masks if mask is not None]
    if not given:
        return None
    rank = max(len(mask.shape) for mask in given)
    joined, *rest = (m if len(m.shape) == rank else ops.expand_dims(m, 1) for m in given)
    for mask in rest:
        joined = ops.logical_and(joined, mask)
    return joined
