"""Read TensorFlow checkpoints with NumPy alone.

A checkpoint `prefix` is a tensor bundle of two kinds of files:

    prefix.index                  a LevelDB table, variable name -> BundleEntryProto
    prefix.data-00000-of-00001    the values, little-endian, in one or more shards

    table = data blocks, index block, footer (48 bytes: block handles and a magic number)
    block = entries, restart points; after it 1 byte of compression and a CRC-32C
    entry = sizes of the shared start of the key, its rest, and the value; the rest; the value

The index is checked by its CRCs, the data by size only: a CRC over 400 MB is slow in Python.
Values are memory-mapped, one variable at a time: what was read of a mapped file stays in memory
until it is closed.

Source: tensorflow/core/protobuf/tensor_bundle.proto; github.com/google/leveldb table_format.md.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER_SIZE = 48
SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")

OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"
EARLY_ALBERT = ("bert/embeddings/word_embeddings_2", "bert/encoder/layer_shared/")

# The numbers of tensorflow/core/framework/types.proto.
DTYPES = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    17: np.uint16,
    19: np.float16,
    22: np.uint32,
    23: np.uint64,
}


class Entry(NamedTuple):
    """Where the values of a variable lie."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    partitioned: bool


class TensorFlowCheckpoint:
    """The variables of a TensorFlow checkpoint, read on demand.

    Args:
        prefix: such as "chinese_L-12_H-768_A-12/bert_model.ckpt", or one of its files.

    Attributes:
        shapes: dict from variable name to shape.

    Raises:
        FileNotFoundError: the index or a data file is absent.
        ValueError: a file is damaged, truncated, compressed or big-endian, or a variable is
            stored in parts; or the checkpoint is of objects, or of the first albert_zh.

    Example:
        >>> checkpoint = TensorFlowCheckpoint("bert_model.ckpt")
        >>> checkpoint.shapes["bert/pooler/dense/bias"]
        (768,)
        >>> values = checkpoint.read("bert/pooler/dense/bias")
    """

    format = "tensorflow"

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = SUFFIX.sub("", os.fspath(prefix))
        self._index = Path(f"{self.prefix}.index")
        if not self._index.is_file():
            raise FileNotFoundError(
                f"No checkpoint {self.prefix}: it is no directory, and {self._index} is absent."
            )
        table = dict(self._read_table(self._index.read_bytes()))
        header = dict(_fields(table.pop(b"")))
        if header.get(2):
            raise ValueError(f"{self._index} is of big-endian data, which is not supported.")
        entries = {name: _parse_entry(proto) for name, proto in table.items()}
        for name, entry in entries.items():
            if entry.partitioned:
                raise ValueError(
                    f"{self._index} holds {name.decode()} in parts, which is not supported. "
                    "Save it again without a partitioner."
                )
        self._entries = {name.decode(): entry for name, entry in entries.items()}
        self._refuse_others()
        self._shards = [self._find_shard(i, header[1]) for i in range(header[1])]
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of one variable, as a read-only view of the file."""
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name} of {self.prefix} has no numeric dtype ({entry.dtype}).")
        shard, dtype = self._shards[entry.shard], DTYPES[entry.dtype]
        if not entry.size:  # NumPy cannot map an empty file
            return np.empty(entry.shape, dtype)
        values = np.memmap(shard, np.uint8, "r", entry.offset, (entry.size,))
        return values.view(dtype).reshape(entry.shape)

    def _refuse_others(self) -> None:
        """Refuse what could be read, but has the names of no model of ours."""
        if any(name.endswith(OBJECT) for name in self._entries):
            raise ValueError(
                f"{self.prefix} is a checkpoint of Python objects (of tf.train.Checkpoint or "
                "model.save_weights), which names variables by the attributes that held them. "
                "Load it with the program that wrote it, and save the model's variables by "
                "tf.compat.v1.train.Saver, or as a Hugging Face model."
            )
        if any(name.startswith(EARLY_ALBERT) for name in self._entries):
            raise ValueError(
                f"{self.prefix} is of the first albert_zh, which is not the ALBERT of Google, "
                "neither its layers nor their names. Take the files that its authors name "
                "albert_*_google."
            )

    def _find_shard(self, shard: int, count: int) -> Path:
        path = Path(f"{self.prefix}.data-{shard:05}-of-{count:05}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is absent, but {self._index} refers to it.")
        ends = [e.offset + e.size for e in self._entries.values() if e.shard == shard]
        size, needed = path.stat().st_size, max(ends, default=0)
        if size < needed:
            raise ValueError(f"{path} is truncated: {size} bytes of {needed}. Copy it again.")
        return path

    def _read_table(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The (key, value) pairs of a LevelDB table."""
        if len(data) < FOOTER_SIZE or not data.endswith(MAGIC):
            raise ValueError(f"{self._index} is truncated or no TensorFlow checkpoint index.")
        footer = data[-FOOTER_SIZE:]
        _, _, *index = _varints(footer, 4)  # offset and size of the meta and the index block
        for _, handle in _block_entries(self._read_block(data, *index)):
            yield from _block_entries(self._read_block(data, *_varints(handle, 2)))

    def _read_block(self, data: bytes, offset: int, size: int) -> bytes:
        end = offset + size
        if _masked_crc32c(data[offset : end + 1]) != data[end + 1 : end + 5]:
            raise ValueError(f"{self._index} is damaged at byte {offset}. Copy it again.")
        if data[end] != 0:
            raise ValueError(
                f"{self._index} is compressed (type {data[end]}), which is not supported. Save "
                "it again with tf.train.Saver or tf.train.Checkpoint, which do not compress."
            )
        return data[offset:end]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        rest, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + rest]
        position += rest
        yield key, block[position : position + length]
        position += length


def _parse_entry(proto: bytes) -> Entry:
    fields = dict(_fields(proto))
    dims = [dict(_fields(dim)) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return Entry(
        dtype=fields.get(1, 0),
        shape=tuple(dim.get(1, 0) for dim in dims),
        shard=fields.get(3, 0),
        offset=fields.get(4, 0),
        size=fields.get(5, 0),
        partitioned=7 in fields,
    )


def _fields(proto: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protocol buffer message."""
    position = 0
    while position < len(proto):
        tag, position = _varint(proto, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(proto, position)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire_type)
        if size is None:
            size, position = _varint(proto, position)
        yield number, proto[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer in groups of seven bits, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varints(data: bytes, count: int) -> list[int]:
    values, position = [], 0
    for _ in range(count):
        value, position = _varint(data, position)
        values.append(value)
    return values


def _crc32c_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


CRC32C_TABLE = _crc32c_table()


def _masked_crc32c(data: bytes) -> bytes:
    """The Castagnoli CRC as LevelDB stores it: rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC32C_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")
