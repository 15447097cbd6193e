"""Hugging Face directories: one file, shards, half precisions."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from keras_ext.models.huggingface_checkpoint import HuggingFaceCheckpoint

safetensors = pytest.importorskip("safetensors.numpy")

TENSORS = {
    "a": np.arange(6, dtype="float32").reshape(2, 3),
    "b": np.array([1, 2.5, -3], ml_dtypes.bfloat16),
    "c": np.array([[0.5]], "float16"),
    "d": np.array(7),
    "e": np.zeros((2, 0), "float32"),
    "f": np.array([True, False]),
}


def assert_holds_tensors(checkpoint):
    assert checkpoint.shapes == {name: array.shape for name, array in TENSORS.items()}
    for name, array in TENSORS.items():
        values = checkpoint.read(name)
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


def test_one_file(tmp_path):
    safetensors.save_file(TENSORS, tmp_path / "model.safetensors")
    assert_holds_tensors(HuggingFaceCheckpoint(tmp_path))


@pytest.fixture
def sharded(tmp_path):
    weight_map = {}
    for i, names in enumerate(["abe", "cdf"]):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.save_file({name: TENSORS[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    return tmp_path


def test_shards(sharded):
    assert_holds_tensors(HuggingFaceCheckpoint(sharded))


def test_an_absent_shard(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is absent"):
        HuggingFaceCheckpoint(sharded)


@pytest.mark.parametrize("length", [0, 7, 8, 40, -1])
def test_a_truncated_file(sharded, length):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{shard} is damaged or truncated .*Copy it again"):
        HuggingFaceCheckpoint(sharded)


def test_a_dtype_that_numpy_does_not_have(tmp_path):
    header = json.dumps(
        {"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}
    ).encode()
    size = len(header).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(size + header + b"\0")
    with pytest.raises(ValueError, match=r"a of .*model.safetensors is of dtype F8_E5M2"):
        HuggingFaceCheckpoint(tmp_path).read("a")


def test_without_safetensors_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-ext\[nlp\]'"):
        HuggingFaceCheckpoint(tmp_path)
