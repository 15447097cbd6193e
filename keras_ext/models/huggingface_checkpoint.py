"""Hugging Face checkpoints: one `model.safetensors` is written, that or shards are read.

Source: huggingface.co/docs/safetensors. Pickled checkpoints are never read: unpickling runs
whatever code the file holds.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, the dtype bfloat16)
import numpy as np

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """The tensors of a Hugging Face model directory, read on demand.

    Args:
        directory: holds `model.safetensors` or `model.safetensors.index.json`.

    Attributes:
        shapes: dict from tensor name to shape.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: a file is absent.

    Example:
        >>> checkpoint = HuggingFaceCheckpoint("bert-base-chinese")
        >>> checkpoint.shapes["bert.pooler.dense.bias"]
        (768,)
        >>> values = checkpoint.read("bert.pooler.dense.bias")
    """

    format = "huggingface"

    def __init__(self, directory: str | os.PathLike) -> None:
        safetensors = _import_safetensors()
        self._files = {}
        self.shapes = {}
        for path in _shards(Path(directory)):
            file = safetensors.safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118  (no dict: it cannot be iterated)
                self._files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return self._files[name].get_tensor(name)


def write_huggingface_checkpoint(
    directory: str | os.PathLike, tensors: Mapping[str, np.ndarray]
) -> None:
    """Write `model.safetensors`: a file of that name is replaced when all is written.

    Args:
        directory: exists.
        tensors: name -> values, of any dtype of safetensors, bfloat16 included.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: the directory has an index of shards, which is read in preference.

    Example:
        >>> write_huggingface_checkpoint(".", {"classifier.bias": np.zeros(3, "float32")})
    """
    safetensors = _import_safetensors()
    directory = Path(directory)
    if (directory / INDEX).exists():
        raise ValueError(
            f"{directory} holds {INDEX}, which would be read instead of what is saved now. "
            "Give another directory."
        )
    partial = directory / f"partial-{FILE}"
    try:
        # Without a format transformers refuses the file.
        safetensors.numpy.save_file(dict(tensors), partial, metadata={"format": "pt"})
        os.replace(partial, directory / FILE)
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


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        return [directory / FILE]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    paths = [directory / name for name in sorted(set(names))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is absent, but {index} refers to it.")
    return paths
