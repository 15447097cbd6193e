"""Adapters in the format of peft: `adapter_model.safetensors` and `adapter_config.json`.

peft holds Aᵀ and Bᵀ, under the names that the layers have in transformers. Where several
projections of ours are one matrix there, as in GPT-2, it has one A and one B for all of them:

    [x W_q, x W_k] + s [x A_q B_q, x A_k B_k]
        = x [W_q, W_k] + s x [A_q, A_k] [[B_q, 0], [0, B_k]]

of the sum of their ranks, or of r where all have the same A, as when they were loaded.

Source: github.com/huggingface/peft.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import arguments
from keras_ext.models.adapter import Adapter, base_weight
from keras_ext.models.huggingface_checkpoint import (
    HuggingFaceCheckpoint,
    write_huggingface_checkpoint,
)
from keras_ext.models.names import NameTable, Source

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of `adapter_config.json` that change nothing in an adapter that is trained: where it
# came from, how it was initialised and trained, which layers it has, which the keys tell.
PASSING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "peft_type", "r", "lora_alpha", "init_lora_weights"),
}
# Other ways to initialise change the weights under the adapter, too.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def write_adapters(
    directory: str | os.PathLike, adapters: Iterable[Adapter], table: NameTable
) -> None:
    """Write both files, each replaced when its successor is complete.

    Args:
        directory: where to; made if need be.
        adapters: of a model, at least one.
        table: of Hugging Face names.

    Raises:
        ValueError: an adapter has no name in a file of peft; nothing is written then.
    """
    modules: dict[str, dict[int, tuple[Source, Adapter]]] = {}
    transposed = True
    for adapter in adapters:
        source = table.source(adapter.weight.path)
        if source is None or adapter.weight.name != "kernel":
            raise ValueError(
                f"The adapter of {adapter.layer.path} has no place in a file of peft, which "
                "holds those of the Dense layers that the family has. model.save and "
                "save_transformer_model merge it."
            )
        modules.setdefault(_module(source), {})[_part(source)[0]] = source, adapter
        transposed = source.transposed
    scale = adapter.scale
    matrices = {name: _joined(parts, scale) for name, parts in modules.items()}
    rank = max(len(a) for a, _ in matrices.values())
    tensors = {}
    for name, (a, b) in matrices.items():
        missing = rank - len(a)
        tensors[_key(name, "A")] = np.pad(a, ((0, missing), (0, 0)))
        tensors[_key(name, "B")] = np.pad(b, ((0, 0), (0, missing)))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": not transposed,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_huggingface_checkpoint(directory, tensors, WEIGHTS)
    partial = directory / f"partial-{CONFIG}"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / CONFIG)


def read_adapters(
    directory: str | os.PathLike, layers: Iterable[keras.layers.Layer], table: NameTable
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int, float]:
    """A and B by the path of a layer, their rank, and alpha.

    Args:
        directory: with both files.
        layers: that can have adapters.
        table: of Hugging Face names.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: the adapters are not plain LoRA, or do not fit the layers.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}.")
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    _check_plain(config, directory)
    rank = arguments.integer("r", config.get("r"))
    alpha = arguments.number("lora_alpha", config.get("lora_alpha"), "(0, inf)")
    places = _places(layers, table)
    checkpoint = HuggingFaceCheckpoint(directory / WEIGHTS)
    names = _modules(checkpoint, places)
    found = {}
    for name in names:
        down, up = (np.asarray(checkpoint.read(_key(name, x)), "float32") for x in "AB")
        for layer, source in places[name]:
            (inputs, units), (i, number) = layer.kernel.shape, _part(source)
            if down.shape != (rank, inputs) or up.shape != (number * units, rank):
                raise ValueError(
                    f"{name} of {directory / WEIGHTS} has A {down.shape} and B {up.shape}, "
                    f"where {layer.path} needs {(rank, inputs)} and {(number * units, rank)}."
                )
            found[layer.path] = down.T, up[i * units : (i + 1) * units].T
    return found, rank, alpha


def _places(
    layers: Iterable[keras.layers.Layer], table: NameTable
) -> dict[str, list[tuple[keras.layers.Layer, Source]]]:
    """The layers whose kernels are a matrix of transformers, or in it, by its name."""
    prefix = table.weights["token_embedding/embeddings"].partition(".")[0] + "."
    places: dict[str, list[tuple[keras.layers.Layer, Source]]] = {}
    for layer in layers:
        weight = base_weight(layer)
        source = None if weight is None else table.source(weight.path)
        if source is not None and weight is not None and weight.name == "kernel":
            # Models of transformers without heads have names without the prefix.
            for name in {_module(source), _module(source).removeprefix(prefix)}:
                places.setdefault(name, []).append((layer, source))
    return places


def _modules(checkpoint: HuggingFaceCheckpoint, places: Mapping[str, Any]) -> list[str]:
    """The matrices that a file has adapters for; each has a place, A and B."""
    matches = {key: KEY.fullmatch(key) for key in checkpoint.shapes}
    names = sorted({match[1] for match in matches.values() if match})
    wrong = [key for key, match in matches.items() if not (match and match[1] in places)]
    absent = [_key(name, x) for name in names for x in "AB" if _key(name, x) not in matches]
    if wrong or absent or not names:
        raise ValueError(
            f"The adapters do not fit the model: {len(wrong)} tensors of {len(matches)} are of "
            f"no Dense layer of it{_some(wrong)}, {len(absent)} are absent{_some(absent)}."
        )
    return names


def _check_plain(config: Mapping[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{directory} holds an adapter with peft_type={config.get('peft_type')!r}, not "
            "'LORA'."
        )
    unknown = {
        key: value
        for key, value in config.items()
        if key not in PASSING and value not in (None, False, "none", {}, [])
    }
    if config.get("init_lora_weights") not in STARTS:
        unknown["init_lora_weights"] = config["init_lora_weights"]
    if unknown:
        options = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise ValueError(
            f"{directory} is not plain LoRA: {options}. In peft, "
            "model.merge_and_unload().save_pretrained(other) writes a whole model that "
            "build_transformer_model reads."
        )


def _key(name: str, side: str) -> str:
    return f"base_model.model.{name}.lora_{side}.weight"


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")


def _part(source: Source) -> tuple[int, int]:
    return source.part or (0, 1)


def _joined(
    parts: Mapping[int, tuple[Source, Adapter]], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Aᵀ (rank, inputs) and Bᵀ (units, rank) of a matrix of transformers, for this scale.

    Parts of it that have no adapter have zeros in Bᵀ.
    """
    source, first = next(iter(parts.values()))
    number, units = _part(source)[1], first.weight.shape[1]
    downs = [np.transpose(_values(adapter.a)) for _, adapter in parts.values()]
    shared = all(np.array_equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else np.concatenate(downs)
    up = np.zeros((number * units, len(down)), "float32")
    start = 0
    for i, (_, adapter) in parts.items():
        columns = slice(start, start + adapter.layer.lora_rank)
        b = _values(adapter.b) * (adapter.scale / scale)
        up[i * units : (i + 1) * units, columns] = np.transpose(b)
        start += 0 if shared else adapter.layer.lora_rank
    return np.ascontiguousarray(down), up


def _values(variable: keras.Variable) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable), "float32")


def _some(names: list[str]) -> str:
    return f", such as {names[0]}" if names else ""
