"""Files that other programs wrote, and what users of bert4keras write."""

import json

import keras
import numpy as np
import pytest
from families import OWN, SIZES, random_model, randomize, run
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_ext.layers import blocks
from keras_ext.models import (
    T5,
    build_transformer_model,
    family_of,
    load_checkpoint,
    save_transformer_model,
)
from keras_ext.models.bert4keras import BERT4KERAS_ARGUMENTS, BERT4KERAS_MODELS

ROLES = ("query", "key", "value", "output")
UNTIED = {"gated": True, "hidden_act": "gelu_new", "tie_word_embeddings": False}


def saved(model, directory, **fields):
    """The directory, its configuration with other fields."""
    save_transformer_model(model, directory)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


def rewritten(directory, **tensors):
    path = directory / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)
    return directory


def same(one, other):
    outputs = zip(keras.tree.flatten(run(one)), keras.tree.flatten(run(other)), strict=True)
    for x, y in outputs:
        np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------ ties


def test_t5_saved_again_by_transformers_5(tmp_path):
    sizes = {**SIZES, **OWN["t5"], **UNTIED}
    model = random_model("t5", sizes=sizes, with_mlm=True)
    fields = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    again = build_transformer_model(saved(model, tmp_path, **fields), with_mlm=True)
    same(model, again)
    assert not family_of(again).tie_word_embeddings
    tied = T5.from_config({**sizes, "scale_decoder_outputs": True, "tie_word_embeddings": None})
    assert tied.tie_word_embeddings


def test_a_tie_is_believed_where_the_file_agrees(tmp_path):
    sizes = {**SIZES, **OWN["t5"], **UNTIED}
    model = random_model("t5", sizes=sizes, with_mlm=True)
    saved(model, tmp_path, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight must be equal to shared\.weight, .*tie_word_embed"
    ):
        build_transformer_model(tmp_path, with_mlm=True)
    build_transformer_model(tmp_path)  # whose hidden states need no matrix of logits
    table = load_file(tmp_path / "model.safetensors")["shared.weight"]
    rewritten(tmp_path, **{"lm_head.weight": table})
    report = build_transformer_model(tmp_path, with_mlm=True).checkpoint_report
    assert report.ignored == {"lm_head.weight": "tied to shared.weight"}
    rewritten(tmp_path, **{"encoder.embed_tokens.weight": table + 1})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight must be equal to shared"):
        build_transformer_model(tmp_path)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_logits_of_their_own_are_not_taken_for_tied_ones(name, tmp_path):
    model = random_model("bert", with_mlm=True)
    original = {"weight": "bert.embeddings.word_embeddings.weight"}.get(
        name, "cls.predictions.bias"
    )
    save_transformer_model(model, tmp_path)
    values = load_file(tmp_path / "model.safetensors")[original]
    decoder = f"cls.predictions.decoder.{name}"
    same(
        model,
        build_transformer_model(rewritten(tmp_path, **{decoder: values}), with_mlm=True),
    )
    rewritten(tmp_path, **{decoder: values + 1})
    before = model.get_weights()
    for target in (model, keras.Model(model.inputs, ops.softmax(model.outputs[1]))):
        with pytest.raises(ValueError, match=rf"{decoder} must be equal to {original}"):
            load_checkpoint(target, tmp_path)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    build_transformer_model(tmp_path)  # no logits


def test_what_has_no_place_in_the_model_is_told(tmp_path):
    save_transformer_model(random_model("bert"), tmp_path)
    config = {**SIZES, "type_vocab_size": 0}
    with pytest.warns(UserWarning, match=r"1 variables of .*token_type_embeddings\.weight"):
        build_transformer_model(config, tmp_path)
    fewer = build_transformer_model({**SIZES, "num_hidden_layers": 1}, tmp_path)  # no warning
    assert "not in the model" in fewer.checkpoint_report.ignored.values()
    gated = random_model("bert", sizes={**SIZES, "hidden_act": ["gelu", "linear"]})
    save_transformer_model(gated, tmp_path)
    with pytest.warns(UserWarning, match=r"6 variables of .*layer\.0\.intermediate\.dense_1"):
        build_transformer_model(SIZES, tmp_path)


# ------------------------------------------------------------------ configurations


def test_albert_of_transformers_has_a_mapping_whatever_the_widths(tmp_path):
    sizes = {**SIZES, "embedding_size": 8}
    google = build_transformer_model(sizes, model="albert")
    assert "embedding_projection" not in {layer.name for layer in google.layers}
    theirs = randomize(build_transformer_model({**sizes, "model_type": "albert"}))
    assert theirs.get_layer("embedding_projection").kernel.shape == (8, 8)
    # A file of transformers, which knows no field of ours.
    again = build_transformer_model(saved(theirs, tmp_path, embedding_projection=None))
    same(theirs, again)
    with pytest.warns(UserWarning, match="embedding_hidden_mapping_in"):
        load_checkpoint(google, tmp_path)
    with pytest.raises(ValueError, match="embedding_projection must be True for embedding_si"):
        build_transformer_model(
            {**sizes, "embedding_size": 4, "embedding_projection": False}, model="albert"
        )


@pytest.mark.parametrize("family", ["bert", "albert", "electra_generator"])
def test_a_list_of_activations_is_a_gate(family, tmp_path):
    sizes = {**SIZES, "hidden_act": ["relu", "linear"]}
    model = random_model(family, sizes=sizes)
    feed_forward = blocks(model)[0].feed_forward
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    w, b, v, c, u, d = (
        ops.convert_to_numpy(weight)
        for name in ("intermediate", "linear", "output")
        for weight in getattr(feed_forward, f"{name}_dense").weights
    )
    # Su's FeedForward: the product of an activated and a linear projection.
    expected = (np.maximum(x @ w + b, 0) * (x @ v + c)) @ u + d
    np.testing.assert_allclose(ops.convert_to_numpy(feed_forward(x)), expected, rtol=1e-4)
    save_transformer_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith(
        "keras_ext_"
    )
    same(model, build_transformer_model(tmp_path))


@pytest.mark.parametrize("activations", [["gelu", "relu"], ["gelu", "linear", "linear"]])
def test_other_lists_of_activations_are_refused(activations):
    with pytest.raises(ValueError, match="hidden_act must be like"):
        build_transformer_model({**SIZES, "hidden_act": activations})
    with pytest.raises(ValueError, match="one activation for ModernBERT, got a gate"):
        build_transformer_model({**SIZES, "hidden_act": ["gelu", "linear"]}, model="modernbert")


def test_sizes_of_heads_are_those_of_the_configuration(tmp_path):
    sizes = {**SIZES, "attention_head_size": 3, "attention_key_size": 5}
    model = random_model("bert", sizes=sizes)
    attention = blocks(model)[0].attention
    shapes = {layer: getattr(attention, f"{layer}_dense").kernel.shape for layer in ROLES}
    assert shapes == {"query": (8, 10), "key": (8, 10), "value": (8, 6), "output": (6, 8)}
    save_transformer_model(model, tmp_path)
    same(model, build_transformer_model(tmp_path))
    assert family_of(build_transformer_model({**SIZES, "attention_head_size": 4}))
    with pytest.raises(ValueError, match="attention_head_size must be 4 for GPT2, got 3"):
        build_transformer_model({**SIZES, "attention_head_size": 3}, model="gpt2")


@pytest.mark.parametrize("family", ["bert", "roformer", "roformer_v2"])
def test_without_segments(family, tmp_path):
    sizes = {**SIZES, "type_vocab_size": 2, "segment_vocab_size": 0}  # as bert4keras has it
    model = random_model(family, sizes=sizes)
    assert [x.name for x in model.inputs] == ["token_ids"]
    save_transformer_model(model, tmp_path)
    same(model, build_transformer_model(tmp_path))
    with pytest.raises(ValueError, match="type_vocab_size must be positive for application='u"):
        build_transformer_model(sizes, model=family, application="unilm")
    # Segments of zeros change nothing.
    whole = random_model(family)
    values = {weight.path: weight for weight in model.weights}
    for weight in whole.weights:
        weight.assign(values.get(weight.path, ops.zeros(weight.shape)))
    np.testing.assert_allclose(run(whole), run(model), atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual_attention_scores", True),
        ("hierarchical_position", 0.4),
        ("shared_segment_embeddings", True),
        ("keep_tokens", [0, 1]),
        ("add_cross_attention", True),
        ("layernorm_positioning", "pre"),  # UER's
        ("feed_forward", "gated"),
    ],
)
def test_fields_that_would_change_the_model_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .* for BERT, got "):
        build_transformer_model({**SIZES, field: value})


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize("heads", [{}, {"with_nsp": True}], ids=["pool", "nsp"])
def test_a_linear_pooler(heads, tmp_path):
    model = random_model("bert", with_pool="linear", **heads)
    hidden, *rest = run(model)
    kernel, bias = (ops.convert_to_numpy(w) for w in model.get_layer("pooler").weights)
    np.testing.assert_allclose(rest[-1], hidden[:, 0] @ kernel + bias, atol=1e-5)
    save_transformer_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "keras_ext_bert"  # the pooler of transformers has a tanh
    same(model, build_transformer_model(tmp_path, with_pool=True, **heads))
    same(model, build_transformer_model(tmp_path, with_pool="linear", **heads))


def test_values_of_heads():
    logits = build_transformer_model(SIZES, with_mlm="linear", with_nsp="linear")
    assert [x.shape[1:] for x in logits.outputs] == [(None, 8), (None, 11), (2,)]
    for head, value in (("with_mlm", "softmax"), ("with_nsp", "softmax"), ("with_mlm", 1)):
        with pytest.raises(ValueError, match=f"{head} must be True or False, got {value!r}"):
            build_transformer_model(SIZES, **{head: value})
    with pytest.raises(ValueError, match="with_pool, must be 'tanh' or 'linear', got 'relu'"):
        build_transformer_model(SIZES, with_pool="relu")
    with pytest.raises(ValueError, match="with_pool must be True or False, got 1"):
        build_transformer_model(SIZES, with_pool=1)


def test_the_activation_of_an_electra_generator_is_that_of_the_file(tmp_path):
    sizes = {**SIZES, **OWN["electra_generator"], "hidden_act": "relu"}
    google = build_transformer_model(sizes, model="electra_generator", with_mlm=True)
    assert google.get_layer("mlm_dense").activation is keras.activations.relu
    save_transformer_model(google, tmp_path / "google")
    same(google, build_transformer_model(tmp_path / "google", with_mlm=True))
    sizes |= {"model_type": "electra", "architectures": ["ElectraForMaskedLM"]}
    theirs = build_transformer_model(sizes, with_mlm=True)
    activation = theirs.get_layer("mlm_dense").activation
    x = np.linspace(-3, 3, 13).astype("float32")
    gelu = ops.convert_to_numpy(keras.activations.gelu(x, approximate=False))
    np.testing.assert_allclose(ops.convert_to_numpy(activation(x)), gelu, atol=1e-6)
    with pytest.raises(ValueError, match=r"head_act must be one of gelu, .* got 'mish'"):
        build_transformer_model({**sizes, "head_act": "mish"})


# ------------------------------------------------------------------ bert4keras


@pytest.mark.parametrize("argument", BERT4KERAS_ARGUMENTS)
def test_an_argument_of_bert4keras_is_told_the_way(argument):
    with pytest.raises(TypeError) as error:
        build_transformer_model(SIZES, **{argument: None})
    assert argument in str(error.value)
    assert BERT4KERAS_ARGUMENTS[argument] in str(error.value)


@pytest.mark.parametrize("name", BERT4KERAS_MODELS)
def test_a_model_of_bert4keras_is_told_the_way(name):
    with pytest.raises(ValueError, match=f"{name!r} is the name of a model in bert4keras"):
        build_transformer_model(SIZES, model=name)
