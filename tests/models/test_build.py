"""`build_transformer_model`: configuration, family, heads, rates and checkpoint together."""

import json

import numpy as np
import pytest
from bundle import write_bundle
from keras import ops
from small_bert import SIZES

from keras_ext.models import BERT, build_transformer_model, load_checkpoint

INPUTS = [np.array([[1, 2, 3, 0]], "int32"), np.array([[0, 0, 1, 0]], "int32")]


@pytest.mark.parametrize("name", ["bert_config.json", "config.json"])
def test_configuration_as_dict_file_and_directory(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({**SIZES, "directionality": "bidi"}))
    for config in (SIZES, tmp_path, str(tmp_path / name)):
        model = build_transformer_model(config)
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
    with pytest.raises(ValueError, match=r"Unknown family 'gpt'\. Known: bert\."):
        build_transformer_model(SIZES, model="gpt")
    with pytest.raises(ValueError, match=r"Unknown family 'gpt'\. Known: bert\."):
        load_checkpoint(build_transformer_model(SIZES), tmp_path, family="gpt")
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
