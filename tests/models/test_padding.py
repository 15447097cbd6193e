"""The id of padding: a configuration's, or that of the tokenizer beside it."""

import json
import warnings

import numpy as np
import pytest
from families import SIZES, random_model
from keras import ops

from keras_ext.generation import Generator
from keras_ext.models import (
    build_transformer_model,
    family_of,
    load_checkpoint,
    save_transformer_model,
    select_tokens,
)
from keras_ext.models.padding import tokenizer_padding

ADDED = {"id": 3, "content": "<pad>", "special": True}
TOKENIZERS = {
    "decoder": {
        "tokenizer_config.json": {
            "pad_token": "<pad>",
            "added_tokens_decoder": {"0": {"content": "<s>"}, "3": {"content": "<pad>"}},
        },
        "tokenizer.json": {"added_tokens": [{**ADDED, "id": 5}]},
    },
    "object": {
        "tokenizer_config.json": {"pad_token": {"content": "<pad>", "lstrip": False}},
        "added_tokens.json": {"<pad>": 3},
    },
    "map": {"special_tokens_map.json": {"pad_token": "[P]"}, "vocab.txt": "a\n[PAD]\nb\n[P]\n"},
    "added": {"tokenizer.json": {"added_tokens": [{"id": 0, "content": "<s>"}, ADDED]}},
    "padding": {"tokenizer.json": {"padding": {"pad_id": 3, "pad_token": "[PAD]"}}},
    "vocabulary": {"vocab.txt": "a\nb\nc\n[PAD]\n"},
}
IDS = np.array([[1, 4, 3, 0, 3], [2, 2, 0, 5, 6]])


def write(directory, files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_padding_of_a_tokenizer(name, tmp_path):
    write(tmp_path, TOKENIZERS[name])
    file = list(TOKENIZERS[name])[-1 if name != "decoder" else 0]
    assert tokenizer_padding(tmp_path) == (3, file)


def test_a_tokenizer_without_padding(tmp_path):
    assert tokenizer_padding(tmp_path) is None
    vocabulary = {"model": {"vocab": {"a": 0}}, "padding": None, "added_tokens": []}
    write(tmp_path, {"tokenizer.json": vocabulary, "tokenizer_config.json": {}})
    assert tokenizer_padding(tmp_path) is None


def test_a_roberta_and_its_tokenizer_must_agree(tmp_path):
    sizes = {**SIZES, "max_position_embeddings": 12, "model_type": "roberta"}
    write(tmp_path, {"config.json": {**sizes, "pad_token_id": 1}, **TOKENIZERS["padding"]})
    for config in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=r"pads with id 1, from which .*\.json\) with 3"):
            build_transformer_model(config, checkpoint=None)
    write(tmp_path, {"config.json": {**sizes, "pad_token_id": 3}})
    build_transformer_model(tmp_path, checkpoint=None)


def test_the_tokenizer_beside_a_file_counts(tmp_path):
    write(tmp_path, {"bert_config.json": SIZES, **TOKENIZERS["padding"]})
    with pytest.warns(UserWarning, match="pads with id 0, the tokenizer .* with 3"):
        model = build_transformer_model(tmp_path / "bert_config.json")
    assert family_of(model).pad_token_id == 3


@pytest.mark.parametrize("family", ["bert", "roformer", "roformer_v2", "gau_alpha", "albert"])
def test_padding_of_any_id_is_not_seen(family, tmp_path):
    sizes = {**SIZES, "pad_token_id": 3}
    model = random_model(family, sizes=sizes)
    segments = np.zeros_like(IDS)
    found = ops.convert_to_numpy(model([IDS, segments]))
    behind = np.pad(IDS, ((0, 0), (0, 1)), constant_values=3)
    longer = ops.convert_to_numpy(model([behind, np.zeros_like(behind)]))[:, :5]
    np.testing.assert_allclose(longer[IDS != 3], found[IDS != 3], atol=1e-6)
    save_transformer_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 3
    again = build_transformer_model(tmp_path, model=family)
    np.testing.assert_array_equal(ops.convert_to_numpy(again([IDS, segments])), found)
    assert family_of(select_tokens(model, [4, 3, 0])).pad_token_id == 1


def test_the_padding_of_the_tokenizer_is_taken(tmp_path):
    model = random_model("bert", sizes={**SIZES, "pad_token_id": 3})
    save_transformer_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, {**TOKENIZERS["added"], "config.json": {**config, "pad_token_id": 0}})
    message = r"pads with id 0, the tokenizer \(tokenizer\.json\) with 3, which is taken"
    with pytest.warns(UserWarning, match=message) as caught:
        built = build_transformer_model(tmp_path)
    assert caught[0].filename == __file__
    inputs = [IDS, np.zeros_like(IDS)]
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(inputs)) for m in (built, model)))
    with pytest.warns(UserWarning, match=message) as caught:
        load_checkpoint(built, tmp_path)
        plain = build_transformer_model(SIZES)
        with pytest.raises(ValueError, match="pad_token_id=3, got a model with 0"):
            load_checkpoint(plain, tmp_path)
    assert caught[0].filename == __file__
    save_transformer_model(built, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_transformer_model(tmp_path)
        # A token that the model has no row for is of another vocabulary; GPTs have no padding.
        write(tmp_path, {"tokenizer.json": {"added_tokens": [{**ADDED, "id": 11}]}})
        build_transformer_model(tmp_path)
        build_transformer_model({**SIZES, "pad_token_id": None})


@pytest.mark.parametrize("pad", [-1, 11])
def test_padding_is_a_token_of_the_vocabulary(pad):
    with pytest.raises(ValueError, match=f"pad_token_id must be from 0 to 10, .* got {pad}"):
        build_transformer_model({**SIZES, "pad_token_id": pad})


def test_no_padding_is_generated():
    model = random_model(
        "roformer", sizes={**SIZES, "pad_token_id": 3}, application="lm", with_mlm=True
    )
    # The bias wants padding, then token 0, which is one like others.
    model.get_layer("mlm_bias").bias.assign(np.eye(11)[3] * 99 + np.eye(11)[0] * 50)
    generator = Generator(model)
    texts = generator.generate([[0, 5], [0]], 6)
    assert all(set(np.ravel(text)[-4:]) == {0} for text in texts)
    with pytest.raises(ValueError, match="and not 3, the padding, got 3"):
        generator.generate([[5, 3]], 2)


@pytest.mark.real_data
def test_the_small_e5(shared):
    directory = shared / "checkpoints" / "e5-small-zh"
    assert tokenizer_padding(directory) == (0, "tokenizer.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_transformer_model(directory)
    assert len(model.checkpoint_report.loaded) == 197
    text = np.array([[1, 500, 700, 2]])
    padded = np.pad(text, ((0, 0), (0, 3)))
    found, longer = (ops.convert_to_numpy(model([x, 0 * x])) for x in (text, padded))
    np.testing.assert_allclose(longer[:, :4], found, atol=1e-4)
