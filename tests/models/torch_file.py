"""Write small files of `torch.save` without PyTorch, opcode by opcode."""

import zipfile

import numpy as np

TYPES = {
    **{"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16"},
    **{"int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte"},
    "bool": "Bool",
}
FLOAT = b"ctorch\nFloatStorage\n"
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value):
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def row(*parts):
    return b"(" + b"".join(parts) + b"t"


def table(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key, length, kind=FLOAT, *more):
    return row(text("storage"), kind, text(key), text("cpu"), number(length), *more) + b"Q"


def tensor(values, offset, shape, strides, version="_v2", more=b"\x89" + ORDERED):
    """A call of `_rebuild_tensor_v2` or another version of it."""
    places = (number(offset), row(*map(number, shape)), row(*map(number, strides)))
    return (
        f"ctorch._utils\n_rebuild_tensor{version}\n".encode()
        + row(values, *places, more)
        + b"R"
    )


def parameter(value):
    return b"ctorch._utils\n_rebuild_parameter\n" + row(value, b"\x88", ORDERED) + b"R"


def write_zip(path, pickled, data, compression=zipfile.ZIP_STORED, **others):
    """What torch from 1.6 on writes: `data` are the bytes of each storage."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + pickled + b".")
        for name, contents in {"byteorder": b"little", **others}.items():
            archive.writestr(f"model/{name}", contents)
        for key, contents in data.items():
            archive.writestr(f"model/data/{key}", contents)
        archive.writestr("model/version", b"3\n")


def write_stream(path, pickled, data, lengths=None, little=b"\x88"):
    """What torch before 1.6 writes: `lengths` of the storages, of float32 unless given."""
    lengths = lengths or {key: len(contents) // 4 for key, contents in data.items()}
    keys = b"](" + b"".join(map(text, data)) + b"e"
    machine = table(protocol_version=number(1001), little_endian=little)
    magic = number(0x1950A86A20F9469CFC6C)
    with open(path, "wb") as file:
        for part in (magic, number(1001), machine, pickled, keys):
            file.write(b"\x80\x02" + part + b".")
        for key, contents in data.items():
            file.write(lengths[key].to_bytes(8, "little") + contents)


def write_torch(path, arrays, write=write_zip):
    """Arrays, each with a storage of its own."""
    items, data, lengths = {}, {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        key, array = f"7{i}", np.asarray(array)
        kind = f"ctorch\n{TYPES[array.dtype.name]}Storage\n".encode()
        strides = [stride // array.itemsize for stride in array.strides]
        items[name] = tensor(storage(key, array.size, kind), 0, array.shape, strides)
        data[key], lengths[key] = array.tobytes("A"), array.size
    options = {"lengths": lengths} if write is write_stream else {}
    write(path, table(**items), data, **options)
