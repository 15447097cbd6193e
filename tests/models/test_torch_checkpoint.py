"""`pytorch_model.bin` without PyTorch: of our own writer and PyTorch's, hostile and damaged."""

import io
import json
import tarfile
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from models.small_bert import HEADS, SIZES
from models.torch_file import (
    ORDERED,
    number,
    parameter,
    row,
    storage,
    table,
    tensor,
    text,
    write_stream,
    write_torch,
    write_zip,
)

from keras_ext.models import build_transformer_model, save_transformer_model
from keras_ext.models.checkpoints import open_checkpoint
from keras_ext.models.torch_checkpoint import TorchCheckpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    **{x: RNG.normal(size=(3, 5)).astype(x) for x in ("float64", "float32", "float16")},
    "bfloat16": RNG.normal(size=(2, 1, 4)).astype(ml_dtypes.bfloat16),
    **{x: np.arange(6).reshape(2, 3).astype(x) for x in ("int64", "int32", "int16", "int8")},
    "uint8": np.array([0, 255], "uint8"),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 3), "float32"),
    "scalar": np.array(1.5),
    "transposed": RNG.normal(size=(2, 4)).astype("float32").T,
}
FORMS = pytest.mark.parametrize("write", [write_zip, write_stream])
BASE = np.arange(20, dtype="float32")
DATA = {"0": BASE.tobytes()}
WHOLE = storage("0", 20)
VECTOR = tensor(WHOLE, 0, (20,), (1,))


def assert_holds(checkpoint, arrays):
    assert checkpoint.shapes == {name: np.shape(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        values = checkpoint.read(name)
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


@FORMS
def test_every_dtype(write, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_torch(path, ARRAYS, write)
    for checkpoint in (TorchCheckpoint(tmp_path), TorchCheckpoint(path)):
        assert_holds(checkpoint, ARRAYS)
    values = checkpoint.read("float32")
    assert isinstance(values.base, np.memmap)  # nothing is copied
    assert not values.flags.writeable


@FORMS
def test_views_of_a_shared_storage(write, tmp_path):
    untyped = storage("8", 8, b"ctorch.storage\nUntypedStorage\n")
    float8 = tensor(untyped, 2, (2, 3), (1, 2), "_v3", b"\x89Nctorch\nfloat8_e5m2\n")
    items = {
        "whole": VECTOR,
        "offset": tensor(WHOLE, 5, (3, 4), (4, 1)),
        "transposed": tensor(WHOLE, 0, (5, 4), (1, 5)),
        "steps": tensor(WHOLE, 1, (7,), (3,)),
        "repeated": tensor(WHOLE, 19, (6,), (0,)),
        "none": tensor(WHOLE, 20, (0, 9), (9, 1)),
        "old": tensor(WHOLE, 4, (2,), (1,), "", b""),
        "parameter": parameter(tensor(WHOLE, 2, (2,), (1,))),
        "float8": float8,
    }
    # The state of the dict itself, which is dropped.
    metadata = ORDERED + table(bert=table(version=number(1)))[1:]
    pickled = ORDERED + table(**items)[1:] + table(_metadata=metadata) + b"b"
    bits = np.arange(40, 48, dtype="uint8")
    options = {"lengths": {"0": 20, "8": 8}} if write is write_stream else {}
    write(tmp_path / "pytorch_model.bin", pickled, {**DATA, "8": bits.tobytes()}, **options)
    expected = {
        "whole": BASE,
        "offset": BASE[5:17].reshape(3, 4),
        "transposed": BASE.reshape(4, 5).T,
        "steps": BASE[1:20:3],
        "repeated": np.full(6, 19, "float32"),
        "none": np.zeros((0, 9), "float32"),
        "old": BASE[4:6],
        "parameter": BASE[2:4],
        "float8": bits.view(ml_dtypes.float8_e5m2)[2:8].reshape(3, 2).T,
    }
    assert_holds(TorchCheckpoint(tmp_path), expected)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="needs PyTorch")
@pytest.mark.parametrize("new", [True, False])
def test_agrees_with_torch(new, tmp_path):
    torch = pytest.importorskip("torch")
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
    names += ["uint8", "bool", "float8_e4m3fn", "float8_e5m2"]
    numbers = torch.arange(24.0).reshape(4, 6)
    tensors = {name: numbers.to(getattr(torch, name)) for name in names}
    tensors |= {
        "shared": numbers,
        "t": numbers.T,
        "rows": numbers[1:3],
        "columns": numbers[:, 2::2],
    }
    tensors |= {
        "expanded": numbers[:1].expand(5, 6),
        "empty": numbers[:0],
        "scalar": numbers[1, 2],
    }
    layer, path = torch.nn.Linear(3, 2), tmp_path / "模型.pt"  # names the entries of the zip
    states = [tensors, layer.state_dict(), {"weight": layer.weight}]
    for tensors in states:
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
        checkpoint = open_checkpoint(path)
        assert list(checkpoint.shapes) == list(tensors)
        for name, value in tensors.items():
            ours = checkpoint.read(name)
            assert ours.dtype.name == str(value.dtype).removeprefix("torch.")
            assert ours.shape == value.shape
            np.testing.assert_array_equal(
                ours.astype("float64"), value.detach().double().numpy()
            )
    for name, value in {
        "sparse": numbers.to_sparse(),
        "complex": numbers.to(torch.complex64),
    }.items():
        torch.save({"x": value}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(
            ValueError, match=rf"nothing of it was run: it holds a {name} tensor"
        ):
            TorchCheckpoint(path)


def call(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + row(*arguments) + b"R"


def hostile(marker):
    """Pickles that would make a file if they were run -> what the error says."""
    command = text(f"touch {marker}")
    system = b"cposix\nsystem\n"
    code = text(f"open({str(marker)!r}, 'w')")
    view = "leaves its storage of 80 bytes"
    return {
        call("posix", "system", command): r"it wants 'posix\.system'",
        call("builtins", "eval", code): r"'builtins\.eval'",
        call("__builtin__", "eval", code): r"'__builtin__\.eval'",
        call(
            "builtins", "getattr", call("builtins", "__import__", text("os")), text("system")
        ): "getattr",
        table(x=VECTOR, y=system + command + b"\x85R"): r"'posix\.system'",
        b"(" + command + b"iposix\nsystem\n": r"'posix\.system'",  # INST
        b"(" + system + command + b"o": r"'posix\.system'",  # OBJ
        b"(ccollections\nOrderedDict\no": "make objects",
        b"ccollections\nOrderedDict\n)\x81": "make objects",  # NEWOBJ
        text("posix") + text("system") + b"\x93" + command + b"\x85R": r"'posix\.system'",
        number(1) + text("system") + b"\x93": "what has no name",
        text("torch") + text("_utils.os.system") + b"\x93": r"'torch\._utils\.os\.system'",
        text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93": "__globals__",
        b"\x82\x01": "opcode EXT1",
        b"\x83\x01\x00": "opcode EXT2",
        b"\x84\x01\x00\x00\x00": "opcode EXT4",
        b"P1\n": "opcode PERSID",
        b"\x8f": "opcode EMPTY_SET",
        table(
            x=VECTOR + table(shape=number(1)) + b"b"
        ): "set the state of a value of type Tensor",
        ORDERED + number(1) + b"b": "set the state of a value of type Ordered",
        b"}}b": "set the state of a value of type dict",
        text("posix.system") + row(command) + b"R": "call a value of type str",
        b"ctorch\nFloatStorage\n)R": "call a value of type StorageType",
        b"ccollections\nOrderedDict\n]R": r"collections\.OrderedDict with a value of type list",
        VECTOR + number(1) + b"a": "append to a value of type Tensor",
        VECTOR + text("x") + number(1) + b"s": "set an item of a value of type Tensor",
        b"}))s": "key of type tuple",
        number(0) + b"Q": "persistent id that is no storage",
        row(text("module"), *[text("x")] * 4) + b"Q": "persistent id that is no storage",
        row(text("storage"), *[text("x")] * 4) + b"Q": "persistent id that is no storage",
        storage("0", -1): "without key or length",
        storage("0", 20, b"ctorch\nFloatStorage\n", text("view")): "storages within storages",
        table(x=VECTOR, y=tensor(storage("0", 10), 0, (1,), (1,))): "described in two ways",
        tensor(WHOLE, 0, (21,), (1,)): view,
        tensor(WHOLE, 1, (20,), (1,)): view,
        tensor(WHOLE, 0, (3, 4), (8, 2)): view,
        tensor(WHOLE, 2**46, (1,), (1,)): view,
        tensor(WHOLE, 0, (2, 2), (2**46, 2**46)): view,
        tensor(WHOLE, 2**62, (1,), (4,)): "impossible",
        tensor(WHOLE, -1, (1,), (1,)): "impossible",
        tensor(WHOLE, 0, (2**40, 2**40), (0, 0)): "impossible",
        tensor(WHOLE, 0, (1,), (1, 1)): "impossible",
        tensor(WHOLE, 0, (1,) * 33, (1,) * 33): "impossible",
        tensor(WHOLE, 0, (-2, 3), (3, 1)): "no counts",
        tensor(WHOLE, 19, (5,), (-1,)): "no counts",
        tensor(WHOLE, 0, (2**63,), (0,)): "no counts",
        tensor(number(0), 0, (1,), (1,)): "without a typed storage",
        tensor(
            WHOLE, 0, (2,), (1,), "_v3", b"\x89Nctorch\nint8\n"
        ): "without an untyped storage",
        tensor(
            WHOLE, 0, (2,), (1,), more=b"\x89N" + table(neg=b"\x88")
        ): "negated or conjugated",
        parameter(number(1)): "no tensor",
        tensor(WHOLE, 0, (2,), (1,), more=b""): "damaged",  # one argument too few
        b"0": "damaged",
        b"h\x05": "damaged",
    }


@FORMS
def test_nothing_is_run(write, tmp_path):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    for pickled, message in hostile(marker).items():
        write(path, pickled, DATA)
        with pytest.raises(ValueError, match=message) as raised:
            TorchCheckpoint(path)
        assert str(path) in str(raised.value)
    assert not marker.exists()


@FORMS
def test_other_contents(write, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    deep = 30_000
    for pickled, message in {
        table(
            model=table(x=VECTOR), epoch=number(1)
        ): "training checkpoint, with a dict at 'model'",
        table(
            epoch=number(1), x=VECTOR
        ): "at 'epoch' it holds a value of type int, not a tensor",
        table(x=b"N"): "at 'x' it holds None",
        b"}" + number(1) + VECTOR + b"s": "a value of type int where a tensor's name",
        VECTOR: "holds a value of type Tensor, not a dict",
        b"]" * deep + b"a" * (deep - 1): "holds a value of type list",
        b"N" + b"\x85" * deep: "holds a value of type tuple",
        table(x=b"N" + b"\x85" * deep): "at 'x' it holds a value of type tuple",
        table(x=call("argparse", "Namespace")): r"it wants 'argparse\.Namespace'",
        table(x=call("torch._utils", "_rebuild_qtensor")): "it holds a quantised tensor",
        table(x=b"ctorch\nQInt8Storage\n"): r"holds a quantised tensor \(torch\.QInt8Storage\)",
    }.items():
        write(path, pickled, DATA)
        with pytest.raises(ValueError, match=message):
            TorchCheckpoint(path)


def test_pickles_of_python_2(tmp_path):
    pairs = b"](](U\x01a" + VECTOR + b"ee"
    write_stream(tmp_path / "x.bin", b"ccollections\nOrderedDict\n" + pairs + b"\x85R", DATA)
    assert_holds(TorchCheckpoint(tmp_path / "x.bin"), {"a": BASE})


def test_other_files(tmp_path):
    path = tmp_path / "x.bin"

    def refused(message):
        with pytest.raises(ValueError, match=message) as raised:
            TorchCheckpoint(path)
        assert str(path) in str(raised.value)

    for data in (b"", b"nonsense", b"PK\x03\x04", b"\x80\x02K\x01.", bytes(600)):
        path.write_bytes(data)
        refused("damaged, truncated or no file of torch.save")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    refused("the tar of torch before 0.2")
    pickled = table(x=VECTOR)
    write_zip(path, pickled, DATA, zipfile.ZIP_DEFLATED)
    refused("compressed or encrypted")
    write_zip(path, pickled, DATA, byteorder=b"big")
    refused("big-endian")
    write_zip(path, pickled, DATA, **{"constants.pkl": b""})
    refused("TorchScript")
    write_zip(path, pickled, {})
    refused("'data/0' is absent")
    for data in (DATA["0"][:-4], DATA["0"] + bytes(4)):
        write_zip(path, pickled, {"0": data})
        refused("bytes of 80")
    write_stream(path, pickled, DATA, little=b"\x89")
    refused("big-endian")
    write_stream(path, pickled, {**DATA, "1": b""})
    refused("keys are not those of its tensors")
    write_stream(path, pickled, DATA, {"0": 21})
    refused("has length 21")
    with pytest.raises(FileNotFoundError):
        TorchCheckpoint(tmp_path)


def damages(whole, end):
    """Bytes flipped and set before the end, and truncations."""
    for i in RNG.integers(0, end, 300):
        byte = whole[i] ^ (1 << RNG.integers(8))
        yield whole[:i] + bytes([byte]) + whole[i + 1 :]
        yield whole[:i] + bytes([RNG.integers(256)]) + whole[i + 1 :]
    for i in RNG.integers(0, len(whole), 60):
        yield whole[:i]


def test_damaged_zip_is_refused_or_the_same(tmp_path):
    path, arrays = tmp_path / "x.bin", {name: ARRAYS[name] for name in ("float32", "int8")}
    write_torch(path, arrays)
    whole, refused, unnamed = path.read_bytes(), 0, 0
    for data in damages(whole, len(whole)):
        path.write_bytes(data)
        try:
            checkpoint = TorchCheckpoint(path)
            read = {name: checkpoint.read(name) for name in checkpoint.shapes}
        except ValueError as error:
            refused += 1
            unnamed += str(path) not in str(error)
        else:
            assert read.keys() == arrays.keys()
            for name, values in read.items():
                np.testing.assert_array_equal(values, arrays[name])
    assert refused > 300
    assert not unnamed


def test_damaged_stream_is_refused_or_readable(tmp_path):
    """It has no sums: a damaged name or value is not seen."""
    path, arrays = tmp_path / "x.bin", {name: ARRAYS[name] for name in ("float32", "int8")}
    write_torch(path, arrays, write_stream)
    whole, refused, unnamed = path.read_bytes(), 0, 0
    for data in damages(whole, len(whole) - ARRAYS["int8"].nbytes):
        path.write_bytes(data)
        try:
            checkpoint = TorchCheckpoint(path)
        except ValueError as error:
            refused += 1
            unnamed += str(path) not in str(error)
        else:
            assert len(data) == len(whole)  # what is truncated is always seen
            for name in checkpoint.shapes:
                checkpoint.read(name)
    assert refused > 200
    assert not unnamed


def test_a_zip_without_sums(tmp_path):
    """Of `torch.serialization.set_crc32_options(False)`."""
    path = tmp_path / "x.bin"
    write_torch(path, {"x": BASE})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            data = data.replace(entry.CRC.to_bytes(4, "little"), bytes(4))
    path.write_bytes(data)
    assert_holds(TorchCheckpoint(path), {"x": BASE})


def test_a_name_is_covered_by_the_sum_and_of_any_language(tmp_path):
    path = tmp_path / "x.bin"
    write_torch(path, {"name": BASE})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"model/", "mödl/".encode()))  # not flagged as UTF-8
    assert_holds(TorchCheckpoint(path), {"name": BASE})
    path.write_bytes(data.replace(b"name", b"mame"))
    with pytest.raises(ValueError, match=r"data\.pkl has another CRC"):
        TorchCheckpoint(path)


def test_shards(tmp_path):
    parts = {
        "float32": "pytorch_model-00001-of-00002.bin",
        "int8": "pytorch_model-00002-of-00002.bin",
    }
    for (name, file), write in zip(parts.items(), (write_zip, write_stream), strict=True):
        write_torch(tmp_path / file, {name: ARRAYS[name]}, write)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    assert_holds(open_checkpoint(tmp_path), {name: ARRAYS[name] for name in parts})
    (tmp_path / parts["int8"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.bin is absent, but .*index"):
        open_checkpoint(tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"x": 1}}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            open_checkpoint(tmp_path)


def test_a_model_of_either_file(tmp_path):
    """The same weights of safetensors, which are preferred, and of both forms."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model = build_transformer_model({**SIZES, "num_hidden_layers": 1}, **HEADS)
    save_transformer_model(model, tmp_path)
    file, ours = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    tensors = safetensors.load_file(file)
    ours.write_bytes(b"nothing")
    build_transformer_model(tmp_path)
    file.unlink()
    for write in (write_zip, write_stream):
        write_torch(ours, tensors, write)
        for checkpoint in ("auto", ours):
            other = build_transformer_model(tmp_path, checkpoint, **HEADS)
            assert not other.checkpoint_report.fresh
            for one, two in zip(model.weights, other.weights, strict=True):
                np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, two)))
