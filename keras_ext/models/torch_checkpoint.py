"""Read `pytorch_model.bin`, what `torch.save` writes, with NumPy alone; nothing in it is run.

Two forms hold the same pickle, a dict from name to tensor. A tensor is a storage, an offset,
sizes and strides, in elements; a storage is a persistent id with its type, key and length.

    torch >= 1.6    a zip, nothing of it compressed: NAME/data.pkl, NAME/data/KEY, and more
    torch < 1.6     pickles of a magic number, of 1001, of facts about the machine, the pickle
                    itself and one of a list of keys; then for each key 8 bytes, its length,
                    and its values

The pickle is evaluated by `pickles.evaluate`, which knows the names below and nothing else.
Every tensor is checked against its storage, and every storage against the file, before any
value is touched. Values are memory-mapped. Those of a zip are checked by its CRC when they are
read, once; the older form has none.

Source: torch/serialization.py and torch/_utils.py of PyTorch 0.4 to 2.13.
"""

import io
import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from keras_ext.models.huggingface_checkpoint import shards
from keras_ext.models.pickles import Damaged, Function, Ordered, Refused, evaluate, kind

TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LOCAL_HEADER = 30  # bytes before the name of an entry of a zip

# The names of dtypes as PyTorch spells them in "torch.float8_e5m2".
DTYPES = {
    **{x: np.dtype(x) for x in ("float64", "float32", "float16", "bool")},
    **{x: np.dtype(x) for x in ("int64", "int32", "int16", "int8")},
    **{x: np.dtype(x) for x in ("uint64", "uint32", "uint16", "uint8")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    "Bool": "bool",
}
REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    **{f"torch.{x}Storage": "a quantised tensor" for x in ("QInt8", "QUInt8", "QInt32")},
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    **{f"torch.Complex{x}Storage": "a complex tensor" for x in ("Float", "Double")},
    **{f"torch.complex{x}": "a complex tensor" for x in (32, 64, 128)},
}


@dataclass(frozen=True, eq=False)
class StorageType:
    """Of what a storage is; that of an untyped one, whose tensors say it, is None."""

    dtype: np.dtype | None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype else 1


@dataclass(frozen=True, eq=False)
class Storage:
    """Values that tensors share, `length` of them (bytes, if untyped)."""

    type: StorageType
    key: str
    length: int

    @property
    def size(self) -> int:
        return self.length * self.type.itemsize


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage, in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Place(NamedTuple):
    """Where a storage lies; its CRC, or 0 where none was written."""

    path: Path
    offset: int
    size: int
    crc: int


class TorchCheckpoint:
    """The tensors of `pytorch_model.bin`, read on demand, without PyTorch and running nothing.

    Args:
        path: such a file, or a directory that holds `pytorch_model.bin` or shards with
            `pytorch_model.bin.index.json`.

    Attributes:
        shapes: dict from tensor name to shape.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged or truncated, no flat dict of tensors, or asks for
            anything but tensors of numbers: of code, nothing is run.

    Example:
        >>> checkpoint = TorchCheckpoint("bert-base-chinese")
        >>> checkpoint.shapes["bert.pooler.dense.bias"]
        (768,)
        >>> values = checkpoint.read("bert.pooler.dense.bias")
    """

    format = "huggingface"  # of the names

    def __init__(self, path: str | os.PathLike) -> None:
        self._tensors: dict[str, tuple[Tensor, Place]] = {}
        for file in shards(Path(path), TORCH_FILE, TORCH_INDEX):
            self._tensors |= _read_file(file)
        self.shapes = {name: tensor.shape for name, (tensor, _) in self._tensors.items()}
        self._checked: set[Place] = set()

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, as a read-only view of the file."""
        tensor, place = self._tensors[name]
        if not math.prod(tensor.shape):  # NumPy cannot map an empty file
            return np.empty(tensor.shape, tensor.dtype)
        data = np.memmap(place.path, np.uint8, "r", place.offset, (place.size,))
        if place.crc and place not in self._checked:
            if zlib.crc32(data.data) != place.crc:
                raise ValueError(
                    f"{place.path} is damaged in the values of {name}. Copy it again."
                )
            self._checked.add(place)
        size = tensor.dtype.itemsize
        strides = tuple(stride * size for stride in tensor.strides)
        return np.ndarray(tensor.shape, tensor.dtype, data, tensor.offset * size, strides)


def _read_file(path: Path) -> dict[str, tuple[Tensor, Place]]:
    """The tensors of a file, checked, and where their storages lie."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            file.seek(0)
            if start[257:262] == b"ustar":
                raise Refused("it is the tar of torch before 0.2; load and save it with torch")
            read = _read_zip if start.startswith(b"PK\x03\x04") else _read_stream
            tensors, places = read(path, file)
    except Refused as error:
        raise ValueError(
            f"{path} was not loaded, and nothing of it was run: {error}."
        ) from None
    except Damaged as error:
        raise ValueError(
            f"{path} is damaged, truncated or no file of torch.save ({error}). Copy it again."
        ) from error
    return {name: (tensor, places[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_zip(path: Path, file: IO[bytes]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except Exception as error:  # zipfile raises many kinds for damaged bytes
        raise Damaged(f"{type(error).__name__}: {error}") from error
    roots = [n.removesuffix("/data.pkl") for n in entries if n.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        raise Damaged("a zip without one data.pkl")
    root = roots[0]
    if f"{root}/constants.pkl" in entries:
        raise Refused("it is a program of TorchScript, not a dict of tensors")

    def place(name: str) -> Place:
        if f"{root}/{name}" not in entries:
            raise Damaged(f"{name[:100]!r} is absent")
        return _place(path, file, entries[f"{root}/{name}"])

    def contents(name: str) -> bytes:
        entry = place(name)
        file.seek(entry.offset)
        data = file.read(entry.size)
        if entry.crc and zlib.crc32(data) != entry.crc:
            raise Damaged(f"{name} has another CRC")
        return data

    if f"{root}/byteorder" in entries and contents("byteorder") != b"little":
        raise Refused("its values are big-endian")
    storages: dict[str, Storage] = {}
    tensors = _tensors(io.BytesIO(contents("data.pkl")), storages)
    places = {key: place(f"data/{key}") for key in storages}
    for key, storage in storages.items():
        if places[key].size != storage.size:
            raise Damaged(
                f"storage {key[:100]!r} has {places[key].size} bytes of {storage.size}"
            )
    return tensors, places


def _place(path: Path, file: IO[bytes], entry: zipfile.ZipInfo) -> Place:
    """Where the contents of an entry lie: after a header, a name and padding."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Refused("it is compressed or encrypted; load and save it with torch")
    end = path.stat().st_size
    if not 0 <= entry.header_offset < end:
        raise Damaged("an entry is outside of the file")
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) != LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise Damaged("an entry has no header")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"  # as zipfile has read it
    if file.read(name) != entry.orig_filename.encode(encoding):
        raise Damaged("an entry has two names")
    offset = entry.header_offset + LOCAL_HEADER + name + extra
    if offset + entry.file_size > end:
        raise Damaged("an entry is longer than the file")
    return Place(path, offset, entry.file_size, entry.CRC)


def _read_stream(path: Path, file: IO[bytes]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    try:  # a mapped file reads no more than there is, whatever length a pickle claims
        stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise Damaged("it is empty") from error
    with stream:
        return _read_mapped(path, stream)


def _read_mapped(path: Path, file: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, Place]]:
    if evaluate(file) != MAGIC:
        raise Damaged("it has not the magic number")
    protocol, machine = evaluate(file), evaluate(file)
    if protocol != PROTOCOL or not isinstance(machine, dict):
        raise Damaged("it is of no known protocol")
    if machine.get("little_endian") is not True:
        raise Refused("its values are big-endian")
    storages: dict[str, Storage] = {}
    tensors = _tensors(file, storages)
    keys = evaluate(file)
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise Damaged("it has no list of keys")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise Damaged("its keys are not those of its tensors")
    places, end = {}, len(file)
    for key in keys:
        length = int.from_bytes(file.read(8), "little")
        if length != storages[key].length:
            raise Damaged(f"storage {key[:100]!r} has length {length}")
        places[key] = Place(path, file.tell(), storages[key].size, crc=0)
        if places[key].offset + places[key].size > end:
            raise Damaged("it ends early")
        file.seek(places[key].size, os.SEEK_CUR)
    return tensors, places


def _tensors(file: IO[bytes] | mmap.mmap, storages: dict[str, Storage]) -> dict[str, Tensor]:
    """The flat dict of tensors that is pickled here; their storages are added to the others."""

    def persistent(identity: Any) -> Storage:
        storage = _storage(identity)
        known = storages.setdefault(storage.key, storage)
        if known.size != storage.size or known.type.dtype != storage.type.dtype:
            raise Refused(f"storage {storage.key[:100]!r} is described in two ways")
        return known

    tensors = evaluate(file, KNOWN, persistent)
    if not isinstance(tensors, dict):
        raise Refused(f"it holds {kind(tensors)}, not a dict of tensors")
    for key in tensors:
        if not isinstance(key, str):
            raise Refused(f"it holds {kind(key)} where a tensor's name should be")
    others = {key[:100]: x for key, x in tensors.items() if not isinstance(x, Tensor)}
    for key, value in others.items():
        if isinstance(value, dict):
            raise Refused(
                f"it is a training checkpoint, with a dict at {key!r}. If the model's tensors "
                f"are there, save them alone, with torch.save(torch.load(file)[{key!r}], ...)"
            )
    for key, value in others.items():
        raise Refused(f"at {key!r} it holds {kind(value)}, not a tensor")
    return tensors


def _storage(identity: Any) -> Storage:
    if not isinstance(identity, tuple) or len(identity) not in (5, 6):
        raise Refused("it has a persistent id that is no storage")
    label, type_, key, _, length = identity[:5]
    if label != "storage" or not isinstance(type_, StorageType):
        raise Refused("it has a persistent id that is no storage")
    if not isinstance(key, str) or not _are_counts([length]):
        raise Refused("it has a storage without key or length")
    if len(identity) == 6 and identity[5] is not None:
        raise Refused("it has storages within storages; load and save it with torch")
    return Storage(type_, key, length)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage) or storage.type.dtype is None:
        raise Refused("it has a tensor without a typed storage")
    return _view(storage, storage.type.dtype, offset, shape, strides)


def _rebuild_tensor_v2(storage, offset, shape, strides, _grad, _hooks, bits=None) -> Tensor:
    _check_bits(bits)
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage, offset, shape, strides, _grad, _hooks, dtype, bits=None
) -> Tensor:
    _check_bits(bits)
    if not (isinstance(storage, Storage) and storage.type.dtype is None):
        raise Refused("it has a tensor without an untyped storage")
    if not isinstance(dtype, np.dtype):
        raise Refused("it has a tensor without a dtype")
    return _view(storage, dtype, offset, shape, strides)


def _rebuild_parameter(tensor: Any, _grad, _hooks) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("it has a parameter that is no tensor")
    return tensor


def _check_bits(bits: Any) -> None:
    if bits:
        raise Refused("it has a tensor whose values are negated or conjugated when read")


def _view(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor that stays in its storage."""
    for sizes in (shape, strides):
        if not isinstance(sizes, tuple) or not _are_counts(sizes):
            raise Refused("it has a tensor with sizes or strides that are no counts")
    fits = len(shape) == len(strides) <= 32  # NumPy 1 has no more axes
    if not fits or not _are_counts([offset, math.prod(shape)]):
        raise Refused("it has a tensor of impossible sizes, strides or offset")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.size:
        raise Refused(
            f"it has a tensor of shape {shape}, strides {strides} and offset {offset} that "
            f"leaves its storage of {storage.size} bytes"
        )
    return Tensor(storage, dtype, offset, shape, strides)


def _are_counts(values: Any) -> bool:
    """Whether all are integers, from 0, that a machine can count with."""
    return all(type(value) is int and 0 <= value < 2**47 for value in values)


def _known() -> Mapping[str, Any]:
    functions: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": Ordered.of,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    known: dict[str, Any] = dict(REFUSED)
    known |= {name: Function(name, call) for name, call in functions.items()}
    known |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    known |= {
        f"torch.{name}Storage": StorageType(DTYPES[dtype]) for name, dtype in STORAGES.items()
    }
    known |= dict.fromkeys(
        ("torch.UntypedStorage", "torch.storage.UntypedStorage"), StorageType(None)
    )
    return known


KNOWN = _known()
