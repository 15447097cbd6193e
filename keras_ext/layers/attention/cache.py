"""Keys and values of the tokens before, kept in a ring of places.

Token t is in the place t mod size, so that once `size` more came the oldest is forgotten. Some
tokens at a time may be added where they do not go round the end.

Heads stand before places: the products of a step read them in this order. In the other one XLA
turned the whole cache around at every step, which took three times the products themselves.
"""

from typing import Any

from keras import ops


def empty_cache(
    batch_size: int, size: int, num_heads: int, key_dim: int, value_dim: int, dtype: str
) -> dict[str, Any]:
    """A ring of `size` places with nothing in it.

    Returns: `key` and `value`, (batch, heads, size, dim), and `length`, the number of tokens
        that came.
    """
    shape = (batch_size, num_heads, size)
    return {
        "key": ops.zeros((*shape, key_dim), dtype),
        "value": ops.zeros((*shape, value_dim), dtype),
        "length": ops.zeros((), "int32"),
    }


def next_positions(cache: dict[str, Any], number: Any) -> Any:
    """Positions of the next tokens, (number,)."""
    return cache["length"] + ops.arange(number)


def extend_cache(
    cache: dict[str, Any], key: Any, value: Any, causal: bool
) -> tuple[dict[str, Any], Any, Any, Any, Any]:
    """The cache with the next tokens.

    Args:
        cache: of `empty_cache`, or of the step before.
        key: encoded, (batch, tokens, heads, key_dim).
        value: (batch, tokens, heads, value_dim).
        causal: the tokens do not see later ones among them.

    Returns: the new cache, its keys and values (batch, size, heads, dim), the positions of its
        places (size,), negative where nothing is yet, and which of them the tokens see, boolean
        (1, 1, tokens, size).
    """
    size, number = ops.shape(cache["key"])[2], ops.shape(key)[1]
    start = (0, 0, cache["length"] % size, 0)
    last = cache["length"] + number - 1
    positions = last - (last - ops.arange(size)) % size
    seen = ops.broadcast_to(positions >= 0, (number, size))
    if causal:
        seen = ops.logical_and(seen, positions <= next_positions(cache, number)[:, None])
    new = {
        "key": ops.slice_update(cache["key"], start, ops.swapaxes(key, 1, 2)),
        "value": ops.slice_update(cache["value"], start, ops.swapaxes(value, 1, 2)),
        "length": last + 1,
    }
    kept = (ops.swapaxes(new[name], 1, 2) for name in ("key", "value"))
    return new, *kept, positions, seen[None, None]
