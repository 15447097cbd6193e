"""Keys and values of the tokens before, kept in a ring of places, or those in a window.

Token t is in the place t mod size of the ring, so that once `size` more came the oldest is
forgotten. Some tokens at a time may be added where they do not go round the end. The cache of a
window is in the order of the tokens, and takes any number of them.

Heads stand before places: the products of a step read them in this order. In the other one XLA
turned the whole cache around at every step, which took three times the products themselves.
"""

from typing import Any

from keras import ops

from keras_ext.layers.attention.dot_product import of_rank_4


def empty_cache(
    batch_size: int, size: int, num_heads: int, key_dim: int, value_dim: int, dtype: str
) -> dict[str, Any]:
    """`size` places with nothing in them.

    Returns: `key` and `value`, (batch, heads, size, dim), `valid`, boolean (batch, size), which
        places hold a token that is no padding, and `length`, the number of tokens that came.
    """
    shape = (batch_size, num_heads, size)
    return {
        "key": ops.zeros((*shape, key_dim), dtype),
        "value": ops.zeros((*shape, value_dim), dtype),
        "valid": ops.zeros((batch_size, size), "bool"),
        "length": ops.zeros((), "int32"),
    }


def next_positions(cache: dict[str, Any], number: Any) -> Any:
    """Positions of the next tokens, (number,)."""
    return cache["length"] + ops.arange(number)


def extend_cache(
    cache: dict[str, Any],
    key: Any,
    value: Any,
    causal: bool,
    valid: Any = None,
    attention_mask: Any = None,
) -> tuple[dict[str, Any], Any, Any, Any, Any]:
    """The cache with the next tokens.

    Args:
        cache: of `empty_cache`, or of the step before.
        key: encoded, (batch, tokens, heads, key_dim).
        value: (batch, tokens, heads, value_dim).
        causal: the tokens do not see later ones among them.
        valid: boolean (batch, tokens), False at padding. Default: None, there is none.
        attention_mask: boolean (batch, tokens, tokens), what the tokens see of each other, also
            of rank 4 with heads, sizes of 1 broadcast. Default: None, everything.

    Returns: the new cache, its keys and values (batch, size, heads, dim), the positions of its
        places (size,), negative where nothing is yet, and which of them the tokens see, boolean
        (batch, heads or 1, tokens or 1, size).
    """
    size, number = ops.shape(cache["key"])[2], ops.shape(key)[1]
    place = cache["length"] % size
    last = cache["length"] + number - 1
    positions = last - (last - ops.arange(size)) % size
    key, value, valid = _as_kept(key, value, valid)
    new = {
        "key": ops.slice_update(cache["key"], (0, 0, place, 0), key),
        "value": ops.slice_update(cache["value"], (0, 0, place, 0), value),
        "valid": ops.slice_update(cache["valid"], (0, place), valid),
        "length": last + 1,
    }
    seen = new["valid"][:, None, None]
    if causal:
        order = positions <= next_positions(cache, number)[:, None]
        seen = ops.logical_and(seen, order)
    if attention_mask is not None:
        mask = of_rank_4("attention_mask", ops.cast(attention_mask, "bool"))
        rows = ops.shape(mask)[:2]
        mask = ops.broadcast_to(mask, (*rows, number, number))
        everything = ops.ones((*rows, number, size), "bool")
        seen = ops.logical_and(seen, ops.slice_update(everything, (0, 0, 0, place), mask))
    kept = (ops.swapaxes(new[name], 1, 2) for name in ("key", "value"))
    return new, *kept, positions, seen


def shift_cache(
    cache: dict[str, Any], key: Any, value: Any, valid: Any = None
) -> tuple[dict[str, Any], Any, Any, Any]:
    """The cache with the next tokens, as many as before: the oldest are forgotten.

    Args:
        cache, key, value, valid: as in `extend_cache`.

    Returns: the new cache, and of the tokens in the old one and the next the keys and values
        (batch, size + tokens, heads, dim) and which are valid, (batch, size + tokens).
    """
    number = ops.shape(key)[1]
    names = ("key", "value", "valid")
    parts = zip(names, _as_kept(key, value, valid), (2, 2, 1), strict=True)
    joined = {name: ops.concatenate([cache[name], x], axis) for name, x, axis in parts}
    new = {
        "key": joined["key"][:, :, number:],
        "value": joined["value"][:, :, number:],
        "valid": joined["valid"][:, number:],
        "length": cache["length"] + number,
    }
    both = (ops.swapaxes(joined[name], 1, 2) for name in ("key", "value"))
    return new, *both, joined["valid"]


def _as_kept(key: Any, value: Any, valid: Any) -> tuple[Any, Any, Any]:
    """Heads before tokens, and a mask of the tokens."""
    valid = ops.ones(ops.shape(key)[:2], "bool") if valid is None else ops.cast(valid, "bool")
    return ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2), valid
