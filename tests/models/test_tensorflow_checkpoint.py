"""The NumPy reader of TensorFlow checkpoints, against our own writer and TensorFlow's."""

import ml_dtypes
import numpy as np
import pytest
from bundle import write_bundle

from keras_ext.models.checkpoints import open_checkpoint
from keras_ext.models.tensorflow_checkpoint import TensorFlowCheckpoint

RNG = np.random.default_rng(0)
VARIABLES = {
    "bert/float32": RNG.normal(size=(3, 5)).astype("float32"),
    "bert/float64": RNG.normal(size=7),
    "bert/float16": RNG.normal(size=(2, 2, 2)).astype("float16"),
    "bert/bfloat16": RNG.normal(size=(4, 1)).astype(ml_dtypes.bfloat16),
    "bert/int32": np.arange(300, dtype="int32"),
    "bert/empty": np.zeros((0, 3), "float32"),
    "global_step": np.array(2**40),
    **{
        f"bert/encoder/layer_{i}/bias": RNG.normal(size=200).astype("float32")
        for i in range(12)
    },
}


@pytest.fixture
def prefix(tmp_path):
    write_bundle(tmp_path / "model.ckpt", VARIABLES)
    return tmp_path / "model.ckpt"


def assert_holds(checkpoint, variables):
    assert checkpoint.shapes == {name: np.shape(array) for name, array in variables.items()}
    for name, array in variables.items():
        values = checkpoint.read(name)
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


def test_reads_every_type_and_shape(prefix):
    assert_holds(TensorFlowCheckpoint(prefix), VARIABLES)


def test_values_are_mapped_not_read(prefix):
    values = TensorFlowCheckpoint(prefix).read("bert/float32")
    assert isinstance(values.base, np.memmap)
    assert not values.flags.writeable


def test_agrees_with_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow")
    prefix = str(tmp_path / "model.ckpt")
    parts = []
    for i in range(2):  # two shards of data, and enough names for several blocks
        part = {k: v for j, (k, v) in enumerate(VARIABLES.items()) if j % 2 == i}
        part |= {
            f"part_{i}/{j:05}/a_long_name_to_fill_a_block": np.array(j) for j in range(2000)
        }
        parts.append(part)
        names, tensors = list(part), [tf.constant(value) for value in part.values()]
        tf.raw_ops.SaveV2(
            prefix=f"{prefix}.part{i}",
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=tensors,
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[f"{prefix}.part{i}" for i in range(2)], destination_prefix=prefix
    )
    checkpoint = TensorFlowCheckpoint(prefix)
    assert_holds(checkpoint, parts[0] | parts[1])
    theirs = tf.train.load_checkpoint(prefix)
    assert {
        k: tuple(v) for k, v in theirs.get_variable_to_shape_map().items()
    } == checkpoint.shapes


def test_tensorflow_reads_our_test_checkpoint(prefix):
    tf = pytest.importorskip("tensorflow")
    theirs = tf.train.load_checkpoint(str(prefix))
    assert {k: tuple(v) for k, v in theirs.get_variable_to_shape_map().items()} == {
        name: array.shape for name, array in VARIABLES.items()
    }


def test_strings_are_listed_but_not_read(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt"),
        tensor_names=["text", "w"],
        shape_and_slices=["", ""],
        tensors=[tf.constant("a"), tf.constant([1.0, 2.0])],
    )
    reader = TensorFlowCheckpoint(tmp_path / "model.ckpt")
    np.testing.assert_array_equal(reader.read("w"), [1, 2])
    with pytest.raises(ValueError, match=r"text of .* no numeric dtype \(7\)"):
        reader.read("text")


def test_checkpoints_of_objects_are_refused(tmp_path):
    tf = pytest.importorskip("tensorflow")
    prefix = tf.train.Checkpoint(w=tf.Variable([1.0, 2.0])).write(str(tmp_path / "object"))
    with pytest.raises(ValueError, match=r"object is a checkpoint of Python objects .*Saver"):
        TensorFlowCheckpoint(prefix)


@pytest.mark.parametrize(
    "name", ["embeddings/word_embeddings_2", "encoder/layer_shared/attention/self/query/bias"]
)
def test_the_first_albert_zh_is_refused(name, tmp_path):
    write_bundle(tmp_path / "model.ckpt", {f"bert/{name}": np.zeros(3, "float32")})
    with pytest.raises(ValueError, match=r"first albert_zh.*albert_\*_google"):
        TensorFlowCheckpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("suffix", [".index", ".meta", ".data-00000-of-00001"])
def test_any_of_the_files_means_the_prefix(suffix, prefix):
    checkpoint = open_checkpoint(f"{prefix}{suffix}")
    assert checkpoint.prefix == str(prefix)
    assert_holds(checkpoint, VARIABLES)


def test_partitioned_variables_are_refused(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt"),
        tensor_names=["table", "table"],
        shape_and_slices=["4 3 0,2:-", "4 3 2,2:-"],
        tensors=[tf.zeros((2, 3)), tf.ones((2, 3))],
    )
    with pytest.raises(ValueError, match="holds table in parts"):
        TensorFlowCheckpoint(tmp_path / "model.ckpt")


@pytest.mark.real_data
def test_the_small_google_checkpoint(shared):
    directory = shared / "checkpoints" / "tiny_random_bert"
    checkpoint = TensorFlowCheckpoint(directory / "bert_model.ckpt")
    rows = [line.split("\t") for line in (directory / "variables.tsv").read_text().splitlines()]
    assert {name: str(list(shape)) for name, shape in checkpoint.shapes.items()} == {
        name: shape for name, shape, *_ in rows
    }
    data = (directory / "bert_model.ckpt.data-00000-of-00001").read_bytes()
    for name, _, offset, size in rows:
        start = int(offset)
        assert checkpoint.read(name).tobytes() == data[start : start + int(size)]


def test_absent_files(prefix, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: .*nowhere\.index is absent"):
        TensorFlowCheckpoint(tmp_path / "nowhere")
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.unlink()
    with pytest.raises(FileNotFoundError, match=f"{data} is absent"):
        TensorFlowCheckpoint(prefix)


def test_truncated_data(prefix, tmp_path):
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"truncated: {len(whole) - 1} bytes of {len(whole)}"):
        TensorFlowCheckpoint(prefix)


def test_damaged_index(prefix, tmp_path):
    index = tmp_path / "model.ckpt.index"
    whole = index.read_bytes()
    for damaged in (whole[:-1], b"", b"no checkpoint at all" * 10):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or no TensorFlow checkpoint"):
            TensorFlowCheckpoint(prefix)
    index.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(ValueError, match="damaged at byte 0"):
        TensorFlowCheckpoint(prefix)


def test_compressed_index(tmp_path):
    write_bundle(tmp_path / "model.ckpt", VARIABLES, compression=1)
    with pytest.raises(ValueError, match=r"compressed \(type 1\)"):
        TensorFlowCheckpoint(tmp_path / "model.ckpt")
