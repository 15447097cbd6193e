"""Write a small TensorFlow checkpoint without TensorFlow, for tests of the reader.

The layout is that of tensor_bundle.proto over a LevelDB table; see tensorflow_checkpoint.py.
"""

from pathlib import Path

import numpy as np

TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "bfloat16": 14, "float16": 19}
RESTART_EVERY = 4  # keys, so that small tables have prefix compression and several restarts


def write_bundle(prefix: Path, variables: dict[str, np.ndarray], compression: int = 0) -> None:
    """One shard, one data block for every eight variables."""
    entries = [(b"", field(1, 1) + field(3, field(1, 1)))]  # one shard, version 1
    data = b""
    for name in sorted(variables):
        array = np.asarray(variables[name])
        shape = b"".join(field(2, field(1, size)) for size in array.shape)
        proto = field(1, TYPES[array.dtype.name]) + field(2, shape)
        proto += field(4, len(data)) + field(5, array.nbytes)
        entries.append((name.encode(), proto))
        data += array.tobytes()
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)

    table, handles = b"", []
    for start in range(0, len(entries), 8):
        block = entries[start : start + 8]
        contents = encode_block(block)
        handles.append((block[-1][0], varint(len(table)) + varint(len(contents))))
        table += seal(contents, compression)
    footer = b""
    for block in ([], handles):  # the meta block is empty
        contents = encode_block(block)
        footer += varint(len(table)) + varint(len(contents))
        table += seal(contents, compression=0)
    magic = bytes.fromhex("57fb808b247547db")
    Path(f"{prefix}.index").write_bytes(table + footer.ljust(40, b"\0") + magic)


def encode_block(entries: list[tuple[bytes, bytes]]) -> bytes:
    block, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % RESTART_EVERY == 0:
            restarts.append(len(block))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        rest = key[shared:]
        block += varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value
        last = key
    restarts = restarts or [0]
    return block + np.array([*restarts, len(restarts)], "<u4").tobytes()


def seal(contents: bytes, compression: int) -> bytes:
    """Append the type of compression and the masked CRC-32C, computed bit by bit."""
    contents += bytes([compression])
    crc = 0xFFFFFFFF
    for byte in contents:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return contents + masked.to_bytes(4, "little")


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: an integer or a submessage."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value
