"""The logits of a cached model are those of the whole text."""

import keras
import numpy as np
import pytest
from compiled import compiled
from families import SIZES, random_model
from generation.mixtures import MIXTURES, RunningMean, conditional, linear, mixed, window
from keras import ops

from keras_ext.generation import CachedModel
from keras_ext.layers import LinearAttention, MultiHeadAttention, RotaryPosition
from keras_ext.models import replace_attention, select_blocks, select_tokens
from keras_ext.models.rebuild import copy_layer, rebuild

LONG = {**SIZES, "max_position_embeddings": 16}
TEXT = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [7, 7, 2, 4, 8, 1, 3, 5]], "int32")
SOURCE = np.array([[2, 9, 4, 0, 0], [5, 3, 8, 1, 6]], "int32")
PADDING = (0, 3)  # before the text, in the cache
# All families with a head that predicts tokens, some in both directions of their use.
CASES = [
    ("albert", "lm"),
    ("electra_generator", "lm"),
    ("roformer", "lm"),
    ("roformer_v2", "lm"),
    ("openai-gpt", "lm"),
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


@pytest.mark.parametrize("name", MIXTURES)
def test_any_attention(name):
    """Prompts of 5 and 2 tokens: longer and shorter than the window of 3."""
    model = mixed(name)
    found = stepwise(model, TEXT, prefix=2)
    np.testing.assert_allclose(found, expected(model, TEXT, prefix=2), atol=1e-5)


def test_the_size_of_the_states():
    cached = CachedModel(mixed("linear, softmax, window"))
    sizes = [
        sum(np.prod(x.shape) for x in keras.tree.flatten(state))
        for length in (8, 16)
        for state in cached.initial_states(1, length)["blocks"]
    ]
    assert [*np.equal(sizes[:3], sizes[3:])] == [True, False, True]


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
    assert keras.backend.standardize_dtype(states["blocks"][0]["key"].dtype) == "bfloat16"
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


@keras.saving.register_keras_serializable(package="tests")
class Ahead(RunningMean):
    causal = False


@keras.saving.register_keras_serializable(package="tests")
class Mean(keras.layers.Layer):
    def call(self, x, memory):
        return ops.cumsum(x, 1) / ops.cumsum(ops.ones_like(x), 1)


def test_attentions_are_refused_for_what_they_lack():
    gpt2, unilm, t5 = small("gpt2", "lm"), small("bert", "unilm"), small("t5", "seq2seq")
    for kind, attention, message in (
        (gpt2, Mean(), "of encoder_1, a Mean, has no `initial_state` and `step`"),
        (gpt2, Ahead(), "must not see later tokens, but its encoder_1 does"),
        (gpt2, LinearAttention(2, 4, feature_map="softmax"), "its encoder_1 does"),
        (unilm, linear(), "a LinearAttention, takes no attention_mask .* application='lm'"),
        (unilm, window(), "a MultiHeadAttention, takes no attention_mask in its steps"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedModel(replace_attention(kind, lambda old, new=attention: new, [1]))
    bare = RunningMean(name="bare")
    hidden, logits = gpt2.outputs
    hidden = bare(hidden, hidden)
    logits = gpt2.get_layer("token_embedding")(hidden, reverse=True)
    with pytest.raises(ValueError, match="bare must be the attention of a TransformerBlock"):
        CachedModel(keras.Model(gpt2.inputs, logits))
    mean = keras.saving.serialize_keras_object(Mean())

    def without_recall(layer, *args, **kwargs):
        if layer.name == "decoder_1":
            return copy_layer(layer, cross_attention=mean)(*args, **kwargs)
        return None

    with pytest.raises(ValueError, match="cross attention of decoder_1, a Mean, has no `rem"):
        CachedModel(rebuild(t5, without_recall))


# ------------------------------------------------------------------ inputs besides the tokens


def test_a_condition_of_the_wrong_shape():
    cached, plain = CachedModel(conditional("bert")), CachedModel(small("bert", "lm"))
    valid = np.ones((2, 8), "bool")

    def step(model, condition):
        model.step(TEXT, valid, model.initial_states(2, 8), condition=condition)

    for wrong in (None, np.zeros(3), np.zeros((2, 4)), np.zeros((1, 3))):
        shape = "None" if wrong is None else str(wrong.shape)
        message = f"condition must be an array (2, 3), a row for each text, .* got {shape}."
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            step(cached, wrong)
    with pytest.raises(
        ValueError, match="condition must be None, as bert has no input of that"
    ):
        step(plain, np.zeros((2, 3)))
    seq2seq = CachedModel(conditional("t5"))
    with pytest.raises(ValueError, match=r"condition must be an array \(2, 3\), .* got None"):
        seq2seq.encode(SOURCE)


def test_other_inputs_are_named():
    gpt2, topic = small("gpt2", "lm"), keras.Input((4,), name="topic")
    logits = gpt2.outputs[1] + keras.layers.Dense(11)(topic)[:, None]
    with pytest.raises(ValueError, match="but token_ids, segment_ids and condition, got topic"):
        CachedModel(keras.Model([*gpt2.inputs, topic], logits))
