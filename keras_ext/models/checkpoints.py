"""Load and save the weights of a model by a table of names, and account for every variable.

Every checkpoint variable is either loaded or ignored with a reason, every model weight either
loaded or fresh; what the table names and the model lacks is told, or refused. Everything is
checked before anything is assigned. Saving goes the other way, with the same table: a weight
that it does not name is an error. The tables: `names.py`.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import keras
import numpy as np

from keras_ext import backend
from keras_ext.layers.every import every_layer
from keras_ext.models.adapter import check_not_quantized, check_untrained, merged_weights
from keras_ext.models.huggingface_checkpoint import (
    FILE,
    INDEX,
    HuggingFaceCheckpoint,
    write_huggingface_checkpoint,
)
from keras_ext.models.names import BLOCK, NameTable, Source
from keras_ext.models.tensorflow_checkpoint import TensorFlowCheckpoint
from keras_ext.models.torch_checkpoint import SUFFIXES, TORCH_FILE, TORCH_INDEX, TorchCheckpoint

logger = logging.getLogger("keras_ext")

Checkpoint = TensorFlowCheckpoint | HuggingFaceCheckpoint | TorchCheckpoint


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What became of every checkpoint variable and of every model weight.

    Attributes:
        checkpoint: path that was read.
        loaded: model weight path -> name of the checkpoint variable.
        ignored: name of a checkpoint variable -> reason.
        fresh: paths of the model weights that keep their initial values.
    """

    checkpoint: str
    loaded: Mapping[str, str]
    ignored: Mapping[str, str]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        reasons = Counter(self.ignored.values()).most_common()
        lines = [
            f"{self.checkpoint}: {len(self.loaded)} weights loaded, "
            f"{len(self.ignored)} variables ignored, {len(self.fresh)} weights fresh",
            *(f"  ignored {count}: {reason}" for reason, count in reasons),
            *(f"  fresh: {path}" for path in self.fresh),
        ]
        return "\n".join(lines)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The reader for a TensorFlow prefix, a file of safetensors or of PyTorch, or a directory.

    Of a directory safetensors are preferred, then `pytorch_model.bin`, then a single `*.index`
    file of TensorFlow. Nothing that a file holds is run.

    Raises:
        FileNotFoundError: nothing readable is there.
        ValueError: the directory holds several checkpoints to choose from, or the file is of
            another format.

    Example:
        >>> checkpoint = open_checkpoint("chinese_L-12_H-768_A-12/bert_model.ckpt")
        >>> checkpoint.shapes["bert/pooler/dense/bias"]
        (768,)
    """
    path = Path(path)
    if path.is_file() and path.suffix == Path(FILE).suffix:
        return HuggingFaceCheckpoint(path)
    if path.is_file() and path.suffix in SUFFIXES:
        return TorchCheckpoint(path)
    if path.is_file() and path.suffix in (".h5", ".hdf5", ".keras", ".msgpack", ".npz"):
        raise ValueError(
            f"{path} is in a format that is not read. Give safetensors, pytorch_model.bin or a "
            "TensorFlow checkpoint of the model; what Keras saved, keras.models.load_model or "
            "model.load_weights reads."
        )
    if not path.is_dir():
        return TensorFlowCheckpoint(path)
    if (path / FILE).is_file() or (path / INDEX).is_file():
        return HuggingFaceCheckpoint(path)
    if (path / TORCH_FILE).is_file() or (path / TORCH_INDEX).is_file():
        return TorchCheckpoint(path)
    prefixes = [index.with_suffix("") for index in sorted(path.glob("*.index"))]
    if len(prefixes) == 1:
        return TensorFlowCheckpoint(prefixes[0])
    if prefixes:
        names = ", ".join(prefix.name for prefix in prefixes)
        raise ValueError(f"{path} holds several checkpoints ({names}). Give the path of one.")
    raise FileNotFoundError(
        f"{path} holds neither {FILE}, nor {TORCH_FILE}, nor an index of their shards, nor a "
        "file *.index."
    )


def load_weights(
    model: keras.Model, checkpoint: str | os.PathLike, tables: Mapping[str, NameTable]
) -> CheckpointReport:
    """Assign a checkpoint to the weights of a model.

    Args:
        model: built model, its weights named as in the tables.
        checkpoint: TensorFlow prefix, file or directory, as `open_checkpoint` takes it.
        tables: format ("tensorflow", "huggingface") -> its table of names.

    Raises:
        ValueError: shapes differ, nothing fits, what is tied in the model has values of its
            own in the checkpoint, or the model is quantised or has adapters that were trained
            on other weights; the model is unchanged then.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> report = load_weights(bert, "bert_model.ckpt", BERT.names)
    """
    reader = open_checkpoint(checkpoint)
    for pattern, reason in ((p, r) for t in tables.values() for p, r in t.foreign.items()):
        if any(re.search(pattern, name) for name in reader.shapes):
            raise ValueError(f"{checkpoint} {reason}")
    if reader.format not in tables:
        raise ValueError(
            f"{checkpoint} is of the format {reader.format}, in which the weights of "
            f"{model.name!r} have no names, but only of {', '.join(tables)}."
        )
    check_not_quantized(model, "Loading a checkpoint")
    check_untrained(model)
    table = tables[reader.format]
    stored = _by_canonical_name(reader.shapes, table)
    plan, fresh, mismatches = [], [], []
    for variable, _ in merged_weights(model):
        source = table.source(variable.path)
        if source is not None and source.name not in stored:
            source = table.fallback(source)
        if source is None or source.name not in stored:
            fresh.append(variable.path)
            continue
        name = stored[source.name]
        plan.append((variable, name, source))
        if tuple(variable.shape) != source.shape(reader.shapes[name]):
            mismatches.append(
                f"  {variable.path} {tuple(variable.shape)} <- {name} {reader.shapes[name]}"
                + (" transposed" if source.transposed else "")
                + (", part [{}/{}]".format(*source.part) if source.part else "")
            )
    if mismatches:
        raise ValueError(
            f"{checkpoint} does not fit the model {model.name!r}; no weight was changed:\n"
            + "\n".join(mismatches)
        )
    if not plan:
        raise ValueError(
            f"{checkpoint} shares no variable with the model {model.name!r}: it holds "
            f"{_some(reader.shapes)}, the model {_some(fresh)}."
        )
    loaded = {variable.path: name for variable, name, _ in plan}
    used = set(loaded.values())
    ignored = {canonical: name for canonical, name in stored.items() if name not in used}
    ties = _ties(model, reader, table, stored, ignored)
    for variable, name, source in plan:
        _assign(variable, functools.partial(_read, reader, name, source))
    report = CheckpointReport(
        checkpoint=os.fspath(checkpoint),
        loaded=loaded,
        ignored={
            name: ties.get(canonical) or table.reason_to_ignore(canonical)
            for canonical, name in ignored.items()
        },
        fresh=tuple(fresh),
    )
    logger.info("%s", report)
    lost = _lost(model, table, ignored)
    if lost:
        warnings.warn(
            f"{len(lost)} variables of {checkpoint} have no place in {model.name!r}, although "
            f"such models have them: {', '.join(lost)}. Check the configuration.",
            stacklevel=3,
        )
    if fresh:
        warnings.warn(
            f"{len(fresh)} weights of {model.name!r} are not in {checkpoint} and keep their "
            f"initial values: {', '.join(fresh)}.",
            stacklevel=3,
        )
    return report


def save_weights(model: keras.Model, directory: str | os.PathLike, table: NameTable) -> None:
    """Write the weights of a model as `model.safetensors`, each in the dtype it has, with
    adapters merged into them.

    Args:
        model: built model, its weights named as in the table.
        directory: exists.
        table: of Hugging Face names.

    Raises:
        ValueError: the table does not name a weight of the model; nothing is written then.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> save_weights(bert, ".", BERT.names["huggingface"])
    """
    sources, unnamed = [], []
    for variable, read in merged_weights(model):
        source = table.source(variable.path)
        if source is None:
            unnamed.append(variable.path)
        else:
            sources.append((read, source))
    if unnamed:
        raise ValueError(
            f"The model {model.name!r} has weights that this format has no name for: "
            f"{', '.join(unnamed)}. Save the part without them: keras.Model(model.inputs, "
            "hidden) with the tensor `hidden` that they are applied to."
        )
    tensors: dict[str, np.ndarray] = {}
    parts: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for read, source in sources:
        values = read()
        axis = 0 if source.transposed else -1
        values = values.T if source.transposed else values
        if source.part is None:
            tensors[source.name] = values
        else:
            parts.setdefault((source.name, axis), {})[source.part[0]] = values
    for (name, axis), found in parts.items():
        tensors[name] = np.concatenate([found[i] for i in sorted(found)], axis=axis)
    # safetensors writes the buffer of an array whatever its strides.
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    write_huggingface_checkpoint(directory, contiguous)


def _lost(model: keras.Model, table: NameTable, ignored: Mapping[str, str]) -> list[str]:
    """The ignored variables of blocks that the model has, and of layers that all such models
    have."""
    layers = {variable.path.partition("/")[0] for variable in model.weights}
    lost = []
    for canonical, name in ignored.items():
        owners = {path.partition("/")[0] for path in table.paths(canonical)}
        if owners & layers or any(
            not (BLOCK.search(f"{owner}/") or re.match(table.optional, owner))
            for owner in owners
        ):
            lost.append(name)
    return lost


def _ties(
    model: keras.Model,
    reader: Checkpoint,
    table: NameTable,
    stored: Mapping[str, str],
    ignored: Mapping[str, str],
) -> dict[str, str]:
    """The ignored variables that repeat loaded ones -> the reason.

    Raises:
        ValueError: a variable has values of its own, where the model ties it.
    """
    ties = {}
    embedding = table.weights.get("token_embedding/embeddings", "")
    for canonical, name in ignored.items():
        source, original = table.output(canonical), embedding
        if source is None:
            source, original = Source(canonical), table.copies.get(canonical, "")
        if original not in stored or original in ignored:
            continue
        values, other = reader.read(name), reader.read(stored[original])
        if np.array_equal(values.T if source.transposed else values, other):
            ties[canonical] = f"tied to {stored[original]}"
        elif canonical in table.copies or _is_tied(model):
            raise ValueError(
                f"{name} must be equal to {stored[original]}, to which {model.name!r} ties it; "
                "no weight was changed. Where a family has the field tie_word_embeddings, set "
                "it to False in the configuration."
            )
    return ties


def _is_tied(model: keras.Model) -> bool:
    """Whether the logits are products with the token embedding."""
    return any(
        node["kwargs"].get("reverse")
        for part in (model, *every_layer(model))
        if isinstance(part, keras.Model) and hasattr(part, "operations")
        for layer in part.get_config()["layers"]
        if layer["class_name"] == "TokenEmbedding"
        for node in layer["inbound_nodes"]
    )


def _by_canonical_name(names: Iterable[str], table: NameTable) -> dict[str, str]:
    stored: dict[str, str] = {}
    for name in names:
        other = stored.setdefault(table.canonical(name), name)
        if other != name:
            raise ValueError(
                f"The checkpoint holds both {other} and {name}, which are the same."
            )
    return stored


def _read(
    reader: Checkpoint,
    name: str,
    source: Source,
    shape: tuple[int, ...],
) -> np.ndarray:
    """The values of a weight of this shape."""
    values = source.read(reader.read(name), shape)
    # The copy detaches the weight from the mapped file; half precisions go through float32,
    # which every backend takes from NumPy.
    copy = _aligned(values.shape, np.promote_types(values.dtype, np.float32))
    copy[...] = values
    return copy


def _aligned(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An empty array whose memory JAX can take over; it copies that of any other."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _assign(variable: keras.Variable, read: Callable[..., np.ndarray]) -> None:
    # Private: the initializer of a variable that has no value yet; see `uninitialized`.
    if getattr(variable, "_initializer", None) is None:
        variable.assign(read(shape=tuple(variable.shape)))
    else:
        variable._initializer = lambda shape, dtype: keras.ops.convert_to_tensor(
            backend.wrap_array(read(shape=tuple(shape))), dtype
        )


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Variables made inside get their values at the end: those of a checkpoint that was loaded
    inside, or initial ones. Drawing a hundred million random numbers first would take most of
    the time of loading.
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        with keras.StatelessScope():  # at its end Keras initializes all that have no value
            pass


def skeleton(build: Callable[[], keras.Model]) -> keras.Model:
    """The model that this builds, for its layers: its weights are anything, and cost little."""
    with uninitialized():
        model = build()
        for variable in model.variables:
            _assign(variable, functools.partial(_aligned, dtype=np.dtype("float32")))
    return model


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
