"""RoBERTa: where its tokens stand, and what is no RoBERTa."""

import keras
import numpy as np
import pytest
from bundle import write_bundle
from families import SIZES, randomize, values_of
from keras import ops

from keras_ext import backend
from keras_ext.models import (
    build_transformer_model,
    extend_positions,
    family_of,
    save_transformer_model,
    select_tokens,
)
from keras_ext.models.roberta import OffsetPositionEmbedding

# Of each id of padding: before, between and behind tokens.
PADDED = np.array([[7, 3, 7, 7, 4, 7], [3, 4, 5, 6, 8, 9]])
ROWS = np.array([[0, 1, 0, 0, 2, 0], [1, 2, 3, 4, 5, 6]])


def small(pad=3, rows=10, **given):
    sizes = {**SIZES, "pad_token_id": pad, "max_position_embeddings": rows, **given}
    return randomize(build_transformer_model(sizes, model="roberta"))


class Positions(keras.layers.Layer):
    """The positions alone."""

    def __init__(self, *args):
        super().__init__()
        self.table = OffsetPositionEmbedding(*args, embeddings_initializer="zeros")

    def call(self, token_ids):
        return self.table(ops.zeros((*ops.shape(token_ids), 2)), token_ids)


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("pad", [0, 1, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_are_counted_from_the_padding(pad, compiled):
    layer = OffsetPositionEmbedding(pad + 7, padding_id=pad)
    token_ids = np.where(PADDED == 7, pad, PADDED + 10).astype("int32")
    zeros = np.zeros((2, 6, 2), "float32")
    layer(zeros, token_ids)
    table = np.random.default_rng(0).normal(size=(pad + 7, 2)).astype("float32")
    layer.embeddings.assign(table)
    call = backend.compile(layer, layer.variables) if compiled else layer
    found = call(*map(ops.convert_to_tensor, (zeros, token_ids)))
    np.testing.assert_array_equal(numpy(found), table[pad + ROWS])


def test_rows_that_are_used_twice_train_as_any():
    """The adaptive optimizers of Keras take sparse gradients of a row one by one."""
    model = keras.Sequential([keras.Input((6,), dtype="int32"), Positions(9, 1)])
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    model.train_on_batch(np.where(PADDED == 7, 1, PADDED), np.ones((2, 6, 2)))
    # The first step of Adam is the rate, whatever the gradient: of rows 2 and 3, used twice,
    # of 4 to 7, and of that of padding.
    table = numpy(model.layers[0].table.embeddings)[:, 0]
    np.testing.assert_allclose(table, [0, *[0.1] * 7, 0], rtol=1e-3)


def test_custom_positions_beyond_the_table_are_not_numbers():
    layer = OffsetPositionEmbedding(5, padding_id=1)
    found = numpy(layer(np.zeros((1, 3, 2)), np.array([[2, 2, 1]]), np.array([[2, 3, 9]])))
    np.testing.assert_array_equal(np.isnan(found[0, :, 0]), [False, True, False])


def test_texts_have_as_many_tokens_as_there_are_rows_behind_the_padding():
    model = small(pad=3, rows=10)
    assert numpy(model(np.full((1, 6), 5))).shape == (1, 6, 8)
    with pytest.raises(ValueError, match=r"length 7, but position_embedding has only 6 pos"):
        model(np.full((1, 7), 5))
    with pytest.raises(ValueError, match="max_length must be at least padding_id"):
        small(pad=3, rows=4)


def test_padding_makes_no_difference():
    model = small(pad=3)
    text = np.array([[5, 0, 9]])
    padded = np.array([[3, 5, 3, 0, 9, 3]])
    np.testing.assert_allclose(
        numpy(model(padded))[:, [1, 3, 4]], numpy(model(text)), atol=1e-6
    )


def test_segments_are_an_input_where_there_are_several():
    assert [x.name for x in small(type_vocab_size=2).inputs] == ["token_ids", "segment_ids"]
    assert [x.name for x in small(type_vocab_size=0).inputs] == ["token_ids"]


def test_a_vocabulary_keeps_the_place_of_the_padding(tmp_path):
    model = small(pad=3)
    kept = [9, 4, 0, 3, 7]
    selected = select_tokens(model, kept)
    assert family_of(selected).pad_token_id == 3
    ids = np.array([[0, 2, 4, 3]])
    found = numpy(selected(ids))
    np.testing.assert_allclose(found, numpy(model(np.array(kept)[ids])), atol=1e-6)
    with pytest.raises(ValueError, match=r"tokens\[3\] must be 3, the padding, from whose id"):
        select_tokens(model, [9, 3, 0])
    save_transformer_model(selected, tmp_path)
    np.testing.assert_array_equal(numpy(build_transformer_model(tmp_path)(ids)), found)


def test_further_positions_are_made_of_those_of_tokens():
    model = small(pad=3, rows=10)
    longer = extend_positions(model, 12)
    assert family_of(longer).max_position_embeddings == 16
    old, new = (values_of(m)["position_embedding/embeddings"] for m in (model, longer))
    np.testing.assert_allclose(new[:10], old, atol=1e-6)
    u = (old[4:] - 0.4 * old[4]) / 0.6
    np.testing.assert_allclose(new[10 + 2], 0.4 * u[1] + 0.6 * u[2], atol=1e-5)
    with pytest.raises(ValueError, match="max_length must be from 6 to 36, got 37"):
        extend_positions(model, 37)


def test_what_bert4keras_calls_roberta_is_a_bert(tmp_path):
    with pytest.raises(ValueError, match=r"is a plain BERT, .* Give model='bert'"):
        build_transformer_model({**SIZES, "model_type": "bert"}, model="roberta")
    write_bundle(tmp_path / "bert_model.ckpt", {"bert/pooler/dense/bias": np.zeros(8, "f4")})
    with pytest.raises(ValueError, match=r"bert_model\.ckpt is a plain BERT, .*model='bert'"):
        build_transformer_model(SIZES, tmp_path / "bert_model.ckpt", model="roberta")
    bert = build_transformer_model({**SIZES, "type_vocab_size": 1}, with_mlm=True)
    save_transformer_model(bert, tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a plain BERT, .* Give model='bert'"):
        build_transformer_model(SIZES, tmp_path / "bert", model="roberta")
