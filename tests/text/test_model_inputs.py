"""Encodings of transformers as inputs of models."""

from collections import UserDict

import keras
import numpy as np
import pytest
from families import SIZES, random_model
from keras import ops

from keras_ext.models import build_transformer_model
from keras_ext.text import model_inputs

IDS = [[3, 1, 4, 1], [2, 6, 5, 9]]
SEGMENTS = [[0, 0, 1, 1], [0, 1, 1, 1]]
# Hides tokens that are no padding, also between others.
MASK = [[1, 1, 1, 1], [1, 0, 1, 0]]


def encoding(**given):
    return {"input_ids": IDS, "token_type_ids": SEGMENTS, "attention_mask": MASK, **given}


@pytest.fixture(scope="module")
def bert():
    return random_model("bert", with_pool=True)


def test_the_mask_acts(bert):
    tokens, segments = model_inputs(bert, encoding())
    assert tokens.dtype == segments.dtype == "int32"
    np.testing.assert_array_equal(tokens, [[3, 1, 4, 1], [2, 0, 5, 0]])
    hidden, pooled = (ops.convert_to_numpy(x) for x in bert([tokens, segments]))
    # What is hidden has no influence, what is seen has.
    other = [[3, 1, 4, 1], [2, 7, 5, 8]]
    for ids, equal in ((other, True), ([[3, 1, 4, 1], [2, 6, 8, 9]], False)):
        again = model_inputs(bert, encoding(input_ids=ids))
        same = ops.convert_to_numpy(bert(again)[1]) == pooled
        assert same.all() == equal
    predicted = bert.predict(model_inputs(bert, UserDict(encoding())), verbose=0)
    np.testing.assert_allclose(predicted[0], hidden, atol=1e-6)


def test_hidden_tokens_are_as_absent_as_those_behind_the_end(bert):
    whole = model_inputs(bert, encoding(attention_mask=[[1, 1, 0, 0]] * 2))
    short = [x[:, :2] for x in whole]
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(bert(x)[0])[:, :2] for x in (whole, short)), atol=1e-6
    )


def test_fit_takes_them():
    model = random_model("bert", with_pool=True)
    head = keras.Model(model.inputs, keras.layers.Dense(1)(model.outputs[1]))
    head.compile("sgd", "mse")
    head.fit(model_inputs(head, encoding()), np.ones((2, 1)), verbose=0)


@pytest.mark.parametrize(
    "convert", [np.array, lambda x: ops.convert_to_tensor(x, "int64"), tuple]
)
def test_kinds_of_arrays(bert, convert):
    for found, expected in zip(
        model_inputs(bert, {k: convert(v) for k, v in encoding().items()}),
        model_inputs(bert, encoding()),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_what_is_not_given(bert):
    tokens, segments = model_inputs(bert, {"input_ids": IDS[0]})
    np.testing.assert_array_equal(tokens, [IDS[0]])
    np.testing.assert_array_equal(segments, [[0, 0, 0, 0]])
    placed = build_transformer_model(SIZES, custom_position_ids=True)
    np.testing.assert_array_equal(
        model_inputs(placed, {"input_ids": IDS})[2], [[0, 1, 2, 3]] * 2
    )


def test_a_model_without_padding_or_segments():
    gpt = build_transformer_model(SIZES, model="gpt2")
    ends = {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
    segments = np.zeros((2, 4), int)
    np.testing.assert_array_equal(model_inputs(gpt, {**ends, "token_type_ids": segments}), IDS)
    with pytest.raises(ValueError, match="attention_mask must hide only the ends of texts"):
        model_inputs(gpt, {**ends, "attention_mask": [[1, 1, 1, 1], [0, 1, 1, 1]]})
    with pytest.raises(
        ValueError, match=r"token_type_ids, but gpt2 has only the inputs token_"
    ):
        model_inputs(gpt, {"input_ids": IDS, "token_type_ids": SEGMENTS})


def test_hidden_tokens_between_others_would_move_positions_that_are_counted():
    roberta = build_transformer_model(SIZES, model="roberta")
    left = {"input_ids": [[1, 1, 3, 4]], "attention_mask": [[0, 0, 1, 1]]}
    np.testing.assert_array_equal(model_inputs(roberta, left), left["input_ids"])
    ends = {"input_ids": [[3, 4, 5, 6]], "attention_mask": [[1, 1, 0, 0]]}
    np.testing.assert_array_equal(model_inputs(roberta, ends), [[3, 4, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask must be 1 for all input_ids but 1"):
        model_inputs(roberta, {**ends, "attention_mask": [[1, 0, 1, 1]]})
    placed = build_transformer_model(SIZES, model="roberta", custom_position_ids=True)
    with pytest.raises(ValueError, match="must be without custom_position_ids"):
        model_inputs(placed, ends)


def test_both_sides_of_a_t5():
    t5 = random_model("t5")
    with pytest.raises(
        ValueError, match="lacks 'decoder_input_ids', which t5 takes as decoder"
    ):
        model_inputs(t5, {"input_ids": IDS})
    given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": [[0, 3], [0, 0]]}
    given["decoder_attention_mask"] = [[1, 1], [1, 0]]
    tokens, targets = model_inputs(t5, given)
    np.testing.assert_array_equal(tokens, [[3, 1, 4, 1], [2, 0, 5, 0]])
    np.testing.assert_array_equal(targets, [[0, 3], [0, 0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset_mapping": [[0, 1]]}, "holds offset_mapping, but bert has only the inputs"),
        (
            {"input_ids": [[3, 1], [2]]},
            r"input_ids must be integers \(batch, length\), texts pad",
        ),
        ({"input_ids": [[0.5]]}, "input_ids must be integers .* got an array of float64"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask must be 0 or 1 and \(2, 4\) as inp"),
        ({"attention_mask": np.full((2, 4), -1)}, "with values from -1 to 0"),
        ({"token_type_ids": [[0]]}, r"segment_ids must be \(2, 4\) as token_ids, got \(1, 1\)"),
        (
            {"input_ids": [[3, 0, 4, 1]] * 2},
            "must be 0 where input_ids are 0, which is padding",
        ),
        ({"decoder_attention_mask": MASK}, "holds decoder_attention_mask, but bert has only"),
    ],
)
def test_what_no_ids_can_say(bert, given, message):
    with pytest.raises(ValueError, match=message):
        model_inputs(bert, encoding(**given))


def test_a_mask_without_its_ids(bert):
    with pytest.raises(ValueError, match="holds attention_mask, but no input_ids"):
        model_inputs(bert, {"attention_mask": MASK})
