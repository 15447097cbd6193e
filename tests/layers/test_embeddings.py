"""Token, segment and position embeddings."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend
from keras_ext.layers import PositionEmbedding, SegmentEmbedding, TokenEmbedding

IDS = np.array([[3, 1, 3, 0], [2, 0, 0, 0]], "int32")


def test_token_lookup_and_its_reverse():
    layer = TokenEmbedding(5, 3)
    hidden = ops.convert_to_numpy(layer(IDS))
    (table,) = layer.get_weights()
    np.testing.assert_array_equal(hidden, table[IDS])
    logits = ops.convert_to_numpy(layer(hidden, reverse=True))
    np.testing.assert_allclose(logits, hidden @ table.T, rtol=1e-6, atol=1e-9)
    flat = layer(hidden.reshape(-1, 3), reverse=True)  # the masked positions of a batch, say
    assert tuple(flat.shape) == (8, 5)


def test_both_uses_of_the_tied_table_have_gradients():
    inputs = keras.Input((None,), dtype="int32")
    layer = TokenEmbedding(5, 3)
    model = keras.Model(inputs, layer(layer(inputs), reverse=True))
    (table,) = layer.get_weights()
    factor = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(y * p))
    model.train_on_batch(IDS, factor)
    # d sum(F · H Eᵀ) with H = E[ids]: Fᵀ H by the output, F E at the rows of the input.
    expected = np.einsum("btv,btd->vd", factor, table[IDS])
    np.add.at(expected, IDS, factor @ table)
    np.testing.assert_allclose(table - layer.get_weights()[0], expected, atol=1e-5)


def test_lora_reaches_both_directions():
    layer = TokenEmbedding(5, 3)
    layer.build((None, None))
    (table,) = layer.get_weights()
    layer.enable_lora(1)
    a, b = np.arange(5.0)[:, None], np.ones((1, 3))
    layer.lora_embeddings_a.assign(a)
    layer.lora_embeddings_b.assign(b)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(IDS)), (table + a @ b)[IDS], rtol=1e-5
    )
    logits = ops.convert_to_numpy(layer(np.eye(3, dtype="float32"), reverse=True))
    np.testing.assert_allclose(logits, (table + a @ b).T, rtol=1e-5)


def test_padding_is_masked_and_the_reverse_keeps_that_mask():
    inputs = keras.Input((None,), dtype="int32")
    layer = TokenEmbedding(5, 3, mask_zero=True)
    logits = layer(layer(inputs), reverse=True)
    pooled = keras.layers.GlobalAveragePooling1D()(logits)  # it averages what is not masked
    outputs = keras.Model(inputs, [logits, pooled]).predict(IDS, verbose=0)
    np.testing.assert_allclose(outputs[1][0], outputs[0][0, :3].mean(0), rtol=1e-5)
    np.testing.assert_allclose(outputs[1][1], outputs[0][1, 0], rtol=1e-5)


def test_segments_are_a_lookup():
    layer = SegmentEmbedding(2)
    hidden = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    segments = np.array([[0, 0, 1, 1], [1, 0, 0, 0]], "int32")
    outputs = ops.convert_to_numpy(layer(hidden, segments))
    np.testing.assert_allclose(outputs, hidden + layer.get_weights()[0][segments], rtol=1e-6)


def test_first_adam_step_moves_repeated_segments_by_the_learning_rate():
    # A lookup fails here on TensorFlow with Keras 3.15: there the step is three times too long.
    inputs = [keras.Input((None, 3)), keras.Input((None,), dtype="int32")]
    layer = SegmentEmbedding(2)
    model = keras.Model(inputs, layer(*inputs))
    (before,) = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.01), lambda y, p: ops.sum(y * p))
    hidden, segments = np.zeros((2, 4, 3), "float32"), np.repeat([[0], [1]], 4, axis=1)
    model.train_on_batch([hidden, segments], np.ones_like(hidden))
    np.testing.assert_allclose(before - layer.get_weights()[0], 0.01, rtol=1e-3)


@pytest.mark.parametrize("length", [1, 4, 6])
def test_positions_are_the_first_rows(length):
    layer = PositionEmbedding(6)
    hidden = np.random.default_rng(0).normal(size=(2, length, 3)).astype("float32")
    model = keras.Sequential([keras.Input((None, 3)), layer])  # the length is unknown here
    expected = hidden + layer.get_weights()[0][:length]
    np.testing.assert_allclose(model.predict(hidden, verbose=0), expected, rtol=1e-6)


def test_too_long_inputs_are_refused():
    layer = PositionEmbedding(6, name="positions")
    message = "length 7, but positions has only max_length=6 positions"
    with pytest.raises(ValueError, match=message):
        layer(np.zeros((1, 7, 3), "float32"))
    with pytest.raises(ValueError, match=message):
        layer(keras.Input((7, 3)))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_segment_outside_the_table_is_said_where_it_can_be_seen(wrong):
    layer = SegmentEmbedding(2, "ones")
    layer.build((1, 2, 3), (1, 2))
    with pytest.raises(ValueError, match=rf"segment_ids must be from 0 to 1, .*{wrong}"):
        layer(np.zeros((1, 2, 3)), np.array([[0, wrong]]))
    layer(np.zeros((1, 0, 3)), np.zeros((1, 0), int))
    if keras.backend.backend() != "torch":  # whose one_hot sees for itself
        call = backend.compile(layer, layer.variables)
        outputs = call(np.zeros((1, 2, 3), "float32"), np.array([[0, wrong]]))
        np.testing.assert_array_equal(outputs, [[[1, 1, 1], [0, 0, 0]]])


def test_custom_positions_that_are_used_twice_train_as_any():
    """The first step of Adam is its rate, whatever the gradient; of a row that sparse gradients
    repeat, Keras's on TensorFlow takes another one."""
    inputs = keras.Input((3, 2)), keras.Input((3,), dtype="int32")
    layer = PositionEmbedding(4, "zeros")
    model = keras.Model(inputs, layer(*inputs))
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    model.train_on_batch([np.zeros((1, 3, 2)), np.array([[1, 1, 3]])], np.ones((1, 3, 2)))
    (table,) = layer.get_weights()
    np.testing.assert_allclose(table[:, 0], [0, 0.1, 0, 0.1], rtol=1e-3)


def test_tables_need_rows():
    with pytest.raises(ValueError, match="max_length must be positive, got 0"):
        PositionEmbedding(0)
    with pytest.raises(ValueError, match="num_segments must be positive, got -1"):
        SegmentEmbedding(-1)
