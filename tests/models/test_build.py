"""`build_transformer_model`: configuration, family, heads, rates and checkpoint together."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest
from bundle import write_bundle
from keras import ops
from small_bert import HEADS, SIZES

from keras_ext.models import (
    BERT,
    build_transformer_model,
    save_transformer_model,
)

safetensors = pytest.importorskip("safetensors")

CONFIG_AND_WEIGHTS = ["config.json", "model.safetensors"]
INTERMEDIATE = "encoder_1/feed_forward/intermediate_dense/kernel"

INPUTS = [np.array([[1, 2, 3, 0]], "int32"), np.array([[0, 0, 1, 0]], "int32")]


@pytest.mark.parametrize("name", ["bert_config.json", "config.json"])
def test_configuration_as_dict_file_and_directory(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({**SIZES, "directionality": "bidi"}))
    for config in (SIZES, tmp_path, str(tmp_path / name)):
        model = build_transformer_model(config, checkpoint=None)
        assert [w.shape for w in model.weights] == [
            w.shape for w in BERT(**SIZES).build().weights
        ]


def test_heads_are_passed_on():
    model = build_transformer_model(SIZES, with_mlm=True, with_nsp=True, with_pool=True)
    assert [x.shape[1:] for x in model.outputs] == [(None, 8), (None, 11), (2,), (8,)]


def rates(model):
    block = model.get_layer("encoder_1")
    return model.get_layer("embedding_dropout").rate, block.dropout, block.attention.dropout


def test_dropout_of_the_configuration_or_of_the_caller():
    config = {**SIZES, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    assert rates(build_transformer_model(config)) == (0.3, 0.3, 0.2)
    assert rates(build_transformer_model(config, dropout=0.0)) == (0.0, 0.0, 0.2)
    assert rates(build_transformer_model(config, attention_dropout=0.0)) == (0.3, 0.3, 0.0)


def test_the_checkpoint_is_loaded_and_reported(tmp_path):
    variables = {
        name.format(i=i): np.full(shape, 0.5, "float32")
        for name, shape in {
            "bert/embeddings/word_embeddings": (11, 8),
            "bert/encoder/layer_{i}/intermediate/dense/bias": (12,),
        }.items()
        for i in range(2)
    }
    write_bundle(tmp_path / "model.ckpt", variables)
    with pytest.warns(UserWarning, match="34 weights of 'bert' are not in") as caught:
        model = build_transformer_model(SIZES, tmp_path)
    assert caught[0].filename == __file__
    assert sorted(model.checkpoint_report.loaded.values()) == sorted(variables)
    bias = model.get_layer("encoder_1").feed_forward.intermediate_dense.bias
    assert (ops.convert_to_numpy(bias) == 0.5).all()


@pytest.mark.real_data
@pytest.mark.parametrize("prefix", ["", "bert_model.ckpt"])
def test_the_small_google_checkpoint(shared, prefix):
    directory = shared / "checkpoints" / "tiny_random_bert"
    heads = {"with_mlm": True, "with_nsp": True, "with_pool": True}
    model = build_transformer_model(directory, directory / prefix, **heads)
    report = model.checkpoint_report
    assert (len(report.loaded), len(report.ignored), len(report.fresh)) == (46, 93, 0)
    assert all(n.endswith(("adam_m", "adam_v")) or n == "global_step" for n in report.ignored)
    assert all(np.isfinite(output).all() for output in model.predict(INPUTS, verbose=0))


@pytest.mark.real_data
def test_the_small_google_checkpoint_without_heads(shared):
    directory = shared / "checkpoints" / "tiny_random_bert"
    report = build_transformer_model(directory, directory).checkpoint_report
    heads = sorted(n for n, reason in report.ignored.items() if reason == "not in the model")
    assert (len(report.loaded), len(heads)) == (37, 9)
    assert all(name.startswith(("cls/", "bert/pooler/")) for name in heads)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown family 'gpt3'\. Known: albert, bert, camembert, "
    ):
        build_transformer_model(SIZES, model="gpt3")
    with pytest.raises(FileNotFoundError, match=r"neither bert_config\.json nor config\.json"):
        build_transformer_model(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"absent\.json: neither a file nor a directory"
    ):
        build_transformer_model(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="lacks 'vocab_size'"):
        build_transformer_model({})
    with pytest.raises(TypeError, match="with_crf"):
        build_transformer_model(SIZES, with_crf=True)


# ------------------------------------------------------------------------------- saving


def values_of(model):
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


@pytest.mark.parametrize("heads", [HEADS, {}], ids=["heads", "bare"])
def test_a_saved_model_is_built_again_with_the_same_weights(heads, tmp_path):
    config = {**SIZES, "hidden_act": "relu", "type_vocab_size": 3, "directionality": "bidi"}
    model = build_transformer_model(config, **heads)
    for index, weight in enumerate(model.weights):  # also biases and norms
        weight.assign(np.random.default_rng(index).normal(size=weight.shape))
    directory = tmp_path / "new" / "saved"
    save_transformer_model(model, directory)
    assert sorted(file.name for file in directory.iterdir()) == CONFIG_AND_WEIGHTS
    again = build_transformer_model(directory, **heads)
    assert not again.checkpoint_report.ignored
    before, after = values_of(model), values_of(again)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_saved_files_are_what_transformers_reads(tmp_path):
    model = build_transformer_model(SIZES, with_nsp=True)
    save_transformer_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert BERT.from_config(config) == BERT(**SIZES)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, path in (
            ("bert.encoder.layer.1.intermediate.dense.weight", INTERMEDIATE),
            ("cls.seq_relationship.weight", "nsp/kernel"),
        ):
            np.testing.assert_array_equal(file.get_tensor(name).T, values_of(model)[path])


def test_half_precision_is_saved_as_it_is(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = build_transformer_model(SIZES)
    finally:
        keras.config.set_dtype_policy(policy)
    save_transformer_model(model, tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        stored = file.get_tensor("bert.embeddings.word_embeddings.weight")
    assert stored.dtype == ml_dtypes.bfloat16
    path = "token_embedding/embeddings"
    np.testing.assert_array_equal(stored.astype("float32"), np.float32(values_of(model)[path]))


def test_what_cannot_be_saved_leaves_the_files_there_as_they_are(tmp_path):
    bert = build_transformer_model(SIZES)
    save_transformer_model(bert, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    classes = keras.layers.Dense(3, name="classifier")(bert.output[:, 0])
    with pytest.raises(ValueError, match="no name for: classifier/kernel, classifier/bias"):
        save_transformer_model(keras.Model(bert.inputs, classes), tmp_path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["bert_config.json", "model.safetensors.index.json"])
def test_directories_in_which_other_files_would_be_read_are_refused(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds {name}, which would be read instead"):
        save_transformer_model(build_transformer_model(SIZES), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_a_checkpoint_lacks_has_its_initial_values(tmp_path):
    """Nothing is drawn for weights that are loaded, and nothing is left without a value."""
    save_transformer_model(build_transformer_model(SIZES), tmp_path)
    with pytest.warns(UserWarning, match="keep their initial values"):
        model = build_transformer_model(tmp_path, **HEADS)
    fresh = {w.path: ops.convert_to_numpy(w) for w in model.weights}
    for path in model.checkpoint_report.fresh:
        kind = path.rsplit("/")[-1]
        assert (
            fresh[path].std() > 0
            if kind == "kernel"
            else (fresh[path] == (kind == "gamma")).all()
        )
    assert fresh["pooler/kernel"].std() == pytest.approx(0.02, rel=0.5)
    dropout = build_transformer_model(tmp_path, dropout=0.5)
    ids = np.ones((2, 3), "int32")
    one, two = (ops.convert_to_numpy(dropout([ids, ids], training=True)) for _ in range(2))
    assert np.abs(one - two).max() > 0


def test_a_failed_load_leaves_nothing_behind(tmp_path):
    save_transformer_model(build_transformer_model(SIZES), tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        build_transformer_model({**SIZES, "intermediate_size": 13}, tmp_path)
    layer = keras.layers.Dense(3)
    layer(np.ones((1, 2), "float32"))
    assert ops.convert_to_numpy(layer.kernel).std() > 0
