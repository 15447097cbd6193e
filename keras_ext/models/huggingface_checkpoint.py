"""Hugging Face checkpoints: one `model.safetensors` is written, that or shards are read.

A file is 8 bytes, the size of the header; the header, JSON of name -> dtype, shape and place;
the values, little-endian. safetensors checks all of that. The values are mapped here, a tensor
at a time: safetensors copies them, and keeps what it mapped until it closes the file.

Source: huggingface.co/docs/safetensors.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Entry(NamedTuple):
    """Where the values of a tensor lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class HuggingFaceCheckpoint:
    """The tensors of a Hugging Face model, read on demand.

    Args:
        path: a file of safetensors, or a directory that holds `model.safetensors` or
            `model.safetensors.index.json`.

    Attributes:
        shapes: dict from tensor name to shape.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged or truncated.

    Example:
        >>> checkpoint = HuggingFaceCheckpoint("bert-base-chinese")
        >>> checkpoint.shapes["bert.pooler.dense.bias"]
        (768,)
        >>> values = checkpoint.read("bert.pooler.dense.bias")
    """

    format = "huggingface"

    def __init__(self, path: str | os.PathLike) -> None:
        self._entries = {
            name: entry
            for file in shards(Path(path), FILE, INDEX)
            for name, entry in _read_header(file).items()
        }
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, as a read-only view of the file."""
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{name} of {entry.path} is of dtype {entry.dtype}, not one of ours."
            )
        return np.memmap(entry.path, DTYPES[entry.dtype], "r", entry.offset, entry.shape)


def write_huggingface_checkpoint(
    directory: str | os.PathLike, tensors: Mapping[str, np.ndarray], file: str = FILE
) -> None:
    """Write tensors to a file, which is replaced when all is written.

    Args:
        directory: exists.
        tensors: name -> values, of any dtype of safetensors, bfloat16 included.
        file: Default: `model.safetensors`.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: the directory has an index of shards, which is read in preference.

    Example:
        >>> write_huggingface_checkpoint(".", {"classifier.bias": np.zeros(3, "float32")})
    """
    safetensors = _import_safetensors()
    directory = Path(directory)
    if file == FILE and (directory / INDEX).exists():
        raise ValueError(
            f"{directory} holds {INDEX}, which would be read instead of what is saved now. "
            "Give another directory."
        )
    partial = directory / f"partial-{file}"
    try:
        # Without a format transformers refuses the file.
        safetensors.numpy.save_file(dict(tensors), partial, metadata={"format": "pt"})
        os.replace(partial, directory / file)
    finally:
        partial.unlink(missing_ok=True)


def _import_safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Hugging Face checkpoints need safetensors: pip install 'keras-ext[nlp]'"
        ) from error
    return safetensors


def _read_header(path: Path) -> dict[str, Entry]:
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). Copy it again.") from error
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    header.pop("__metadata__", None)
    return {
        name: Entry(
            path, tensor["dtype"], tuple(tensor["shape"]), start + tensor["data_offsets"][0]
        )
        for name, tensor in header.items()
    }


def shards(path: Path, file: str, index_file: str) -> list[Path]:
    """The files of a checkpoint: the path, if it is one, or those in the directory.

    Args:
        path: a file or a directory.
        file: name of the only one in the directory.
        index_file: name of the index of several, which is preferred.

    Raises:
        FileNotFoundError: the index refers to a file that is absent.
        ValueError: the index is damaged.
    """
    index = path / index_file
    if not index.is_file():
        return [path / file if path.is_dir() else path]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [path / name for name in sorted(set(names))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}).") from error
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is absent, but {index} refers to it.")
    return paths
