"""Read Hugging Face checkpoints: one `model.safetensors`, or shards with an index.

Source: huggingface.co/docs/safetensors. Pickled checkpoints are never read: unpickling runs
whatever code the file holds.
"""

import json
import os
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
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(
                "Hugging Face checkpoints are read by safetensors: pip install 'keras-ext[nlp]'"
            ) from error
        self._files = {}
        self.shapes = {}
        for path in _shards(Path(directory)):
            file = safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118  (no dict: it cannot be iterated)
                self._files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return self._files[name].get_tensor(name)


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
