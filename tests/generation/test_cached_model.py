"""The logits of a cached model are those of the whole text."""

import keras
import numpy as np
import pytest
from compiled import compiled
from families import SIZES, random_model
from keras import ops

from keras_ext.generation import CachedModel
from keras_ext.layers import LinearAttention, MultiHeadAttention, RotaryPosition
from keras_ext.models import replace_attention, select_blocks, select_tokens

LONG = {**SIZES, "max_position_embeddings": 16}
TEXT = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [7, 7, 2, 4, 8, 1, 3, 5]], "int32")
SOURCE = np.array([[2, 9, 4, 0, 0], [5, 3, 8, 1, 6]], "int32")
PADDING = (0, 3)  # before the text, in the cache
# Between them all parts of the families that matter here.
CASES = [
    ("albert", "lm"),
    ("nezha", "lm"),
    ("gau_alpha", "lm"),
    ("gpt2", "lm"),
    ("gpt2_ml", "lm"),
    ("bert", "unilm"),
    ("gau_alpha", "unilm"),
    ("t5", "seq2seq"),
    ("mt5", "seq2seq"),
]


def small(family, kind, **options):
    return random_model(family, sizes=LONG, with_mlm=True, application=kind, **options)


def whole(model, text, prefixes):
    """Logits of the whole texts, whose prompts have so many tokens: (batch, length, 11)."""
    segments = np.zeros_like(text)
    if "prefix_mask" in [layer.name for layer in model.layers]:
        segments[:] = np.arange(text.shape[1]) >= np.array(prefixes)[:, None]
    known = {"token_ids": text, "segment_ids": segments, "decoder_token_ids": text}
    names = [x.name for x in model.inputs]
    if "decoder_token_ids" in names:
        known["token_ids"] = SOURCE
    outputs = compiled(lambda *inputs: model(list(inputs)))(*(known[name] for name in names))
    return ops.convert_to_numpy(next(x for x in outputs if x.shape[-1] == 11))


def stepwise(model, text, prefix, size=16):
    """Logits after the prompt, and after each token behind it, with padding before."""
    cached = CachedModel(model)
    batch, length = text.shape
    pad = max(PADDING)
    valid, given = np.zeros((batch, size), "bool"), {}
    prompts = np.zeros((batch, pad + prefix), "int32")
    if cached.has_memory:
        pad, prompts = 0, text[:, :prefix]
        given = {"memories": cached.encode(SOURCE), "memory_mask": SOURCE != 0}
        valid[:] = True
    else:
        for row, before in enumerate(PADDING):
            valid[row, before:] = True
            prompts[row, before:] = text[row, : prefix + pad - before]
    segments = 1 if cached.has_prefix else 0
    step = compiled(
        lambda ids, segments, states: cached.step(ids, valid, states, segments, **given)
    )
    states = cached.initial_states(batch, size)
    logits, states = step(prompts, np.zeros_like(prompts), states)
    found = [ops.convert_to_numpy(logits)]
    # The rows end together, so that a row with less padding is further in its text.
    for i in range(length - prefix - pad):
        tokens = np.array(
            [
                [text[row, prefix + i + (0 if cached.has_memory else pad - before)]]
                for row, before in enumerate(PADDING)
            ]
        )
        logits, states = step(tokens, np.full_like(tokens, segments), states)
        found.append(ops.convert_to_numpy(logits))
    return np.stack(found, 1)


def expected(model, text, prefix):
    """The same of whole texts."""
    shift = 0 if "decoder_token_ids" in [x.name for x in model.inputs] else max(PADDING)
    prefixes = [prefix + shift - (before if shift else 0) for before in PADDING]
    logits = whole(model, text, prefixes)
    number = text.shape[1] - prefix - shift + 1
    return np.stack(
        [row[start - 1 :][:number] for row, start in zip(logits, prefixes, strict=True)]
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_steps_equal_the_whole(family, kind):
    model = small(family, kind)
    found = stepwise(model, TEXT, prefix=2)
    np.testing.assert_allclose(found, expected(model, TEXT, prefix=2), atol=1e-5)


def test_blocks_that_surgery_made():
    bert = small("bert", "lm")
    assert CachedModel(bert).max_length == 16
    model = replace_attention(
        select_blocks(select_tokens(bert, [0, *range(10, 0, -1)]), [0, 2]),
        lambda old: MultiHeadAttention(2, 4, causal=True, position=RotaryPosition()),
    )
    found = stepwise(model, TEXT, prefix=2)
    np.testing.assert_allclose(found, expected(model, TEXT, prefix=2), atol=1e-5)


def test_the_weights_are_those_of_the_model():
    model = small("gpt2", "lm")
    cached = CachedModel(model)
    states, valid = cached.initial_states(2, 8), np.ones((2, 8), "bool")
    first, _ = cached.step(TEXT, valid, states)
    model.get_layer("encoder_1").feed_forward.output_dense.bias.assign(np.arange(8.0))
    second, _ = cached.step(TEXT, valid, states)
    np.testing.assert_allclose(
        ops.convert_to_numpy(second), whole(model, TEXT, [8, 8])[:, -1], atol=1e-5
    )
    assert np.abs(ops.convert_to_numpy(second - first)).max() > 0.1
    assert len(model.weights) == len({w.path for w in model.weights})


def test_half_precision_gives_float32_logits():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small("gpt2", "lm")
    finally:
        keras.config.set_dtype_policy(policy)
    cached = CachedModel(model)
    states = cached.initial_states(2, 8)
    assert keras.backend.standardize_dtype(states[0]["key"].dtype) == "bfloat16"
    logits, _ = cached.step(TEXT, np.ones((2, 8), "bool"), states)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    exact = whole(small("gpt2", "lm"), TEXT, [8, 8])[:, -1]
    np.testing.assert_allclose(ops.convert_to_numpy(logits), exact, atol=0.2)


def test_models_that_cannot_generate_are_refused():
    with pytest.raises(ValueError, match="must not see later tokens, but its encoder_0 does"):
        CachedModel(small("bert", "encoder"))
    with pytest.raises(ValueError, match="must have one output of 11 logits, got"):
        CachedModel(random_model("gpt2"))
    with pytest.raises(ValueError, match="must be of application 'seq2seq', got"):
        CachedModel(small("t5", "decoder"))
    linear = replace_attention(
        small("bert", "lm"), lambda old: LinearAttention(2, 4, causal=True)
    )
    with pytest.raises(ValueError, match="attention of encoder_0, a LinearAttention, keeps no"):
        CachedModel(linear)
    window = replace_attention(
        small("bert", "lm"), lambda old: MultiHeadAttention(2, 4, causal=True, window=3)
    )
    with pytest.raises(
        ValueError, match="a MultiHeadAttention, keeps no keys and values of all"
    ):
        CachedModel(window)
