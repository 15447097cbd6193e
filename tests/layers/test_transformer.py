"""The Transformer block and its feed-forward layer."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.layers import (
    FeedForward,
    GatedAttentionBlock,
    GatedAttentionUnit,
    LinearAttention,
    MultiHeadAttention,
    RelativePosition,
    RotaryPosition,
    TransformerBlock,
    gelu_tanh,
)

HIDDEN = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, epsilon=1e-12):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


class Mean(keras.layers.Layer):
    """The simplest attention: every position gets the mean of the values."""

    def call(self, query, value):
        return ops.zeros_like(query) + ops.mean(value, axis=1, keepdims=True)

    def compute_output_shape(self, query_shape, value_shape):
        return query_shape


def test_gelu_tanh_is_its_formula():
    x = np.linspace(-4, 4, 33)
    expected = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    outputs = ops.convert_to_numpy(gelu_tanh(ops.convert_to_tensor(x.astype("float32"))))
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert 1e-4 < np.abs(outputs - gelu(x)).max() < 5e-4


def test_feed_forward_is_two_dense_layers_with_exact_gelu():
    layer = FeedForward(16)
    outputs = ops.convert_to_numpy(layer(HIDDEN))
    w1, b1, w2, b2 = (w.astype("float64") for w in layer.get_weights())
    np.testing.assert_allclose(outputs, gelu(HIDDEN @ w1 + b1) @ w2 + b2, atol=1e-5)


def test_the_block_is_its_formula_around_any_attention():
    block = TransformerBlock(Mean(), FeedForward(16))
    outputs = ops.convert_to_numpy(block(HIDDEN))
    h = layer_norm(HIDDEN + HIDDEN.mean(1, keepdims=True, dtype="float64"))
    w1, b1, w2, b2 = (w.astype("float64") for w in block.feed_forward.get_weights())
    np.testing.assert_allclose(outputs, layer_norm(h + gelu(h @ w1 + b1) @ w2 + b2), atol=1e-5)


def test_both_norms_are_like_the_one_given():
    norm = keras.layers.LayerNormalization(epsilon=0.5)
    block = TransformerBlock(Mean(), FeedForward(16), norm=norm)
    assert [x.name for x in (block.attention_norm, block.feed_forward_norm)] == [
        "attention_norm",
        "feed_forward_norm",
    ]
    block.feed_forward.build(HIDDEN.shape)
    block.feed_forward.set_weights([np.zeros(w.shape) for w in block.feed_forward.weights])
    h = layer_norm(HIDDEN + HIDDEN.mean(1, keepdims=True), 0.5)
    outputs = ops.convert_to_numpy(block(HIDDEN))
    np.testing.assert_allclose(outputs, layer_norm(h, 0.5), atol=1e-5)


def test_the_norms_of_a_loaded_model_are_its_own(tmp_path):
    """While it loads, Keras gives objects that are alike to it for one another."""
    hidden = inputs = keras.Input((3, 4))
    for i in range(12):
        parts = MultiHeadAttention(1, 4), FeedForward(4)
        hidden = TransformerBlock(*parts, name=f"block_{i}")(hidden)
    keras.Model(inputs, hidden).save(tmp_path / "model.keras")
    for _ in range(3):
        blocks = keras.models.load_model(tmp_path / "model.keras").layers[1:]
        norms = {id(n) for b in blocks for n in (b.attention_norm, b.feed_forward_norm)}
        assert len(norms) == 24


def test_padding_reaches_the_attention():
    block = TransformerBlock(MultiHeadAttention(2, 4), FeedForward(16))
    padded = np.concatenate([HIDDEN, np.zeros((2, 3, 8), "float32")], axis=1)
    outputs = block(keras.layers.Masking()(padded))[:, :5]
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (outputs, block(HIDDEN))), atol=1e-5)


def test_a_causal_mask_hides_the_future():
    block = TransformerBlock(MultiHeadAttention(2, 4), FeedForward(16))
    causal = np.tri(5, dtype=bool)[None]
    changed = HIDDEN.copy()
    changed[:, 3:] += 1
    first, second = (
        ops.convert_to_numpy(block(x, attention_mask=causal)) for x in (HIDDEN, changed)
    )
    np.testing.assert_allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert np.abs(first[:, 3:] - second[:, 3:]).max() > 0.1


POSITIONS = np.array([[4, 2, 0, 1, 3], [0, 1, 2, 4, 3]])  # an order of the tokens


@pytest.mark.parametrize("crossed", [False, True])
def test_positions_reach_the_attention_but_not_the_memory(crossed):
    attention = MultiHeadAttention(2, 4, position=RotaryPosition())
    memory = {"memory": HIDDEN[:, :3] + 1} if crossed else {}
    cross_attention = MultiHeadAttention(2, 4) if crossed else None
    block = TransformerBlock(attention, FeedForward(16), cross_attention=cross_attention)
    counted = ops.convert_to_numpy(block(HIDDEN, **memory))
    x, expected = (np.take_along_axis(x, POSITIONS[..., None], 1) for x in (HIDDEN, counted))
    outputs = ops.convert_to_numpy(block(x, positions=POSITIONS, **memory))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert np.abs(ops.convert_to_numpy(block(x, **memory)) - expected).max() > 1e-3


def test_an_attention_without_positions_refuses_them():
    for attention in (LinearAttention(2, 4), MultiHeadAttention(2, 4)):
        with pytest.raises(ValueError, match=r"positions .*no effect"):
            TransformerBlock(attention, FeedForward(16))(HIDDEN, positions=POSITIONS)


def transformer_of(recompute):
    attention = MultiHeadAttention(2, 4, dropout=0.2, position=RelativePosition(2))
    return TransformerBlock(attention, FeedForward(16), recompute=recompute)


def gated_of(recompute):
    unit = GatedAttentionUnit(16, 4, dropout=0.2, position=RotaryPosition())
    return GatedAttentionBlock(unit, recompute=recompute)


@pytest.mark.parametrize("make", [transformer_of, gated_of])
def test_a_block_computes_again_at_the_same_positions(make):
    trained = []
    for recompute in (False, True):
        keras.utils.set_random_seed(3)
        inputs, positions = keras.Input((5, 8)), keras.Input((5,), dtype="int32")
        outputs = make(recompute)(keras.layers.Masking()(inputs), positions=positions)
        model = keras.Model([inputs, positions], outputs)
        model.compile("sgd", "mse", jit_compile=keras.backend.backend() != "torch")
        for _ in range(2):
            model.train_on_batch([HIDDEN, POSITIONS], HIDDEN[:, ::-1])
        trained.append(model.get_weights())
    for plain, again in zip(*trained, strict=True):
        np.testing.assert_allclose(again, plain, atol=1e-6)


def test_dropout_acts_in_training_only():
    block = TransformerBlock(
        MultiHeadAttention(2, 4, dropout=0.5), FeedForward(16), dropout=0.5
    )
    quiet, again = (ops.convert_to_numpy(block(HIDDEN)) for _ in "12")
    np.testing.assert_array_equal(quiet, again)
    assert np.abs(ops.convert_to_numpy(block(HIDDEN, training=True)) - quiet).max() > 0.1


@pytest.mark.parametrize("dropout", ["attention", "block"])
def test_the_same_seed_gives_the_same_training_outputs(dropout):
    rates = {"attention": (0.5, 0.0), "block": (0.0, 0.5)}[dropout]

    def run():
        keras.utils.set_random_seed(7)
        attention = MultiHeadAttention(2, 4, dropout=rates[0])
        block = TransformerBlock(attention, FeedForward(16), dropout=rates[1])
        return ops.convert_to_numpy(block(HIDDEN, training=True))

    np.testing.assert_array_equal(run(), run())
