"""Sampling against the probabilities it is to have."""

import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext.generation import sample_tokens

LOGITS = np.array([0.3, -1.0, 2.0, 0.9, -30.0, 1.1, 0.9])
NUMBER = 20_000


def frequencies(logits=LOGITS, **options):
    """How often each token is drawn by evenly spread numbers: exact to 1 / NUMBER."""
    uniforms = ((np.arange(NUMBER) + 0.5) / NUMBER).astype("float32")
    rows = np.broadcast_to(logits, (NUMBER, len(logits))).astype("float32")
    draw = compiled(lambda x, u: sample_tokens(x, u, **options))
    tokens = ops.convert_to_numpy(draw(rows, uniforms))
    assert tokens.dtype == "int32"
    return np.bincount(tokens, minlength=len(logits)) / NUMBER


def probabilities(kept, temperature=1.0):
    p = np.where(kept, np.exp(LOGITS / temperature), 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"temperature": 0.5}, [1, 1, 1, 1, 1, 1, 1]),
        ({"top_k": 2}, [0, 0, 1, 0, 0, 1, 0]),
        ({"top_k": 1}, [0, 0, 1, 0, 0, 0, 0]),
        ({"top_k": 99}, [1, 1, 1, 1, 1, 1, 1]),
        # Sorted: 0.43, 0.18, 0.14, 0.14, 0.08, 0.02.
        ({"top_p": 0.43}, [0, 0, 1, 0, 0, 0, 0]),
        ({"top_p": 0.5}, [0, 0, 1, 0, 0, 1, 0]),
        ({"top_p": 0.8}, [0, 0, 1, 1, 0, 1, 1]),
        ({"top_p": 1.0}, [1, 1, 1, 1, 1, 1, 1]),
        # Of the two that are left 0.71 and 0.29.
        ({"top_k": 2, "top_p": 0.7}, [0, 0, 1, 0, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.75}, [0, 0, 1, 0, 0, 1, 0]),
        ({"top_p": 0.5, "temperature": 3.0}, [0, 0, 1, 1, 0, 1, 0]),
    ],
)
def test_frequencies(options, kept):
    expected = probabilities(np.array(kept, bool), options.get("temperature", 1.0))
    np.testing.assert_allclose(frequencies(**options), expected, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_impossible_is_never_drawn(options):
    logits = np.array([-1e30, 0.0, -1e30, -1e4, 0.0, -1e30])
    assert set(np.flatnonzero(frequencies(logits, **options))) == {1, 4}


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.999}])
def test_the_largest_number_below_one(options):
    """Where rounding puts it at the whole sum."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 50)).astype("float32")
    logits[:, -7:] = -1e30
    almost = np.full(500, np.nextafter(np.float32(1), np.float32(0)))
    tokens = ops.convert_to_numpy(sample_tokens(logits, almost, **options))
    assert (tokens < 43).all()
    first = ops.convert_to_numpy(sample_tokens(logits, 0 * almost, **options))
    assert (first == (0 if not options else logits.argmax(-1))).all()
