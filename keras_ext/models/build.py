"""Build a Transformer by its configuration file, load its checkpoint, save it.

Each family of models is one file: how its configuration is read, what it is built of, and how
its weights are named in checkpoints.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras

from keras_ext.layers import GatedAttentionBlock, TransformerBlock
from keras_ext.models.albert import ALBERT
from keras_ext.models.bert import BERT
from keras_ext.models.checkpoints import (
    CheckpointReport,
    load_weights,
    save_weights,
    uninitialized,
)
from keras_ext.models.electra import ELECTRA, ELECTRAGenerator
from keras_ext.models.gau_alpha import GAUAlpha
from keras_ext.models.gpt import GPT
from keras_ext.models.gpt2 import GPT2
from keras_ext.models.gpt2_ml import GPT2ML
from keras_ext.models.hub import download_model, is_repository
from keras_ext.models.nezha import NEZHA
from keras_ext.models.roformer import RoFormer
from keras_ext.models.roformer_v2 import RoFormerV2
from keras_ext.models.t5 import MT5, T5

# What `model` may be -> the sizes of such a model, and how it is built.
FAMILIES: dict[str, type[BERT]] = {
    "albert": ALBERT,
    "bert": BERT,
    "electra": ELECTRA,
    "electra_generator": ELECTRAGenerator,
    "gau_alpha": GAUAlpha,
    "gpt2": GPT2,
    "gpt2_ml": GPT2ML,
    "mt5": MT5,
    "nezha": NEZHA,
    "openai-gpt": GPT,
    "roformer": RoFormer,
    "roformer_v2": RoFormerV2,
    "t5": T5,
}

CONFIG_FILES = ("bert_config.json", "config.json")


def build_transformer_model(
    config: str | os.PathLike | Mapping[str, Any],
    checkpoint: str | os.PathLike | None = None,
    model: str | None = None,
    *,
    with_mlm: bool = False,
    with_nsp: bool = False,
    with_pool: bool = False,
    with_discriminator: bool = False,
    application: str | None = None,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    recompute: bool = False,
) -> keras.Model:
    """Build a Transformer as a functional Keras model and load its checkpoint.

    The model maps `[token_ids, segment_ids]`, int32 of (batch, length), where token id 0 is
    padding and masked, to the last hidden states (batch, length, hidden), or to a list: those,
    then the outputs of the heads asked for, in the order of the arguments. GPTs have no
    segments and no padding, T5s no segments, but `decoder_token_ids` (see `T5`).

    Under the policies mixed_bfloat16 and mixed_float16 the hidden states, of about unit size,
    are within 0.1 and 0.02 of those in float32 (small random models of every kind).

    Args:
        config: a JSON file, a directory with `bert_config.json` or `config.json`, the id of a
            repository of huggingface.co (see `download_model`), or a dict.
        checkpoint: prefix or directory of a TensorFlow checkpoint, directory or repository of
            a Hugging Face model with safetensors. Default: fresh weights.
        model: the family: "albert", "bert" (also RoBERTa-wwm, MacBERT, RBT3), "electra",
            "electra_generator", "gau_alpha", "gpt2" (also CPM), "gpt2_ml", "mt5", "nezha",
            "openai-gpt", "roformer", "roformer_v2" or "t5". Default: the `model_type` of the
            configuration, or "bert" where it has none.
        with_mlm: add the logits of the masked language model, or of the next token,
            (batch, length, vocabulary).
        with_nsp: add the logits of next-sentence prediction, of ALBERT of the order of
            sentences, (batch, 2).
        with_pool: add the pooled first token, (batch, hidden).
        with_discriminator: add the logits of ELECTRA, positive where a token is replaced,
            (batch, length).
        application: "encoder", "lm" (tokens see no later ones) or "unilm" (nor do those of
            segment 1; those of segment 0 see each other); of a GPT "lm"; of a T5 "seq2seq",
            "encoder" or "decoder". Default: that of the configuration, or the first of these.
        dropout: rate on embeddings and sublayer outputs. Default: that of the configuration.
        attention_dropout: rate on attention weights. Default: that of the configuration.
        recompute: gradient checkpointing, as of `TransformerBlock`, in all blocks. Default:
            False.

    Returns:
        A `keras.Model`; with a checkpoint, `model.checkpoint_report` tells what became of every
        variable and weight. Weights that the checkpoint lacks are warned about.

    Raises:
        ValueError: the family is unknown or has no such head, the configuration is incomplete
            or not of this family, or the checkpoint does not fit.
        FileNotFoundError: configuration or checkpoint is absent.
        OSError: a repository cannot be reached.

    Example:
        >>> directory = "chinese_L-12_H-768_A-12"
        >>> bert = build_transformer_model(directory, directory, with_pool=True)
        >>> hidden, pooled = bert([token_ids, segment_ids])
    """
    config = _read_config(config)
    family = _family(model or config.get("model_type") or "bert").from_config(config)
    asked = {
        "with_mlm": with_mlm,
        "with_nsp": with_nsp,
        "with_pool": with_pool,
        "with_discriminator": with_discriminator,
    }
    heads = {head: True for head, wanted in asked.items() if wanted}
    _check_heads(family, heads)
    if application is not None:
        family = dataclasses.replace(family, application=application)
    if dropout is not None:
        family = dataclasses.replace(family, hidden_dropout_prob=dropout)
    if attention_dropout is not None:
        family = dataclasses.replace(family, attention_probs_dropout_prob=attention_dropout)
    if checkpoint is None:
        transformer = family.build(name=None, **heads)
    else:
        checkpoint = _local(checkpoint)
        with uninitialized():
            transformer = family.build(name=None, **heads)
            report = load_weights(transformer, checkpoint, family.names)
        transformer.checkpoint_report = report
    for block in transformer.layers:
        if isinstance(block, (TransformerBlock, GatedAttentionBlock)):
            block.recompute = recompute
    return transformer


def load_checkpoint(
    model: keras.Model, checkpoint: str | os.PathLike, family: str = "bert"
) -> CheckpointReport:
    """Load a checkpoint into a model that was built here, or around one that was.

    Weights are found by the names of their layers, so further layers may have been added.

    Args:
        model: the model; nothing of it is changed where an error is raised.
        checkpoint: as in `build_transformer_model`.
        family: whose names the weights have. Default: "bert".

    Returns:
        The `CheckpointReport` of everything loaded, ignored and fresh.

    Raises:
        ValueError: shapes differ, nothing fits, or the family is unknown.
        FileNotFoundError: the checkpoint is absent.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> print(load_checkpoint(bert, "bert_model.ckpt"))
        bert_model.ckpt: 21 weights loaded, 2 variables ignored, 0 weights fresh
          ignored 2: not in the model
    """
    return load_weights(model, _local(checkpoint), _family(family).names)


def save_transformer_model(
    model: keras.Model,
    directory: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any],
    family: str = "bert",
) -> None:
    """Write a model as a Hugging Face directory: `model.safetensors` and `config.json`.

    `build_transformer_model(directory, directory)` reads it, and so does `transformers`. Each
    file is replaced when its successor is complete, so that a crash leaves none half-written.

    Args:
        model: a model that was built here, with any heads, or one of its layers. Weights are
            written in the dtype they have.
        directory: where to; made if need be.
        config: what the model was built by, as in `build_transformer_model`.
        family: whose names the weights have. Default: "bert".

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: the model has weights that no layer of the family has, its sizes are not
            those of the configuration, or the directory holds files that are read instead.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> save_transformer_model(bert, "saved", "bert_config.json")
        >>> same = build_transformer_model("saved", "saved")
    """
    sizes = _family(family).from_config(_read_config(config))
    _check_sizes(model, sizes)
    directory = Path(directory)
    first, name = CONFIG_FILES
    if (directory / first).exists():
        raise ValueError(
            f"{directory} holds {first}, which would be read instead of what is saved now. "
            "Give another directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(model, directory, sizes.names["huggingface"])
    partial = directory / f"partial-{name}"
    partial.write_text(json.dumps(sizes.to_config(), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / name)


def _check_heads(family: BERT, heads: Iterable[str]) -> None:
    for head in heads:
        if head not in family.heads:
            raise ValueError(
                f"{type(family).__name__} has no head for {head}. It has: "
                f"{', '.join(family.heads)}."
            )


def _check_sizes(model: keras.Model, sizes: BERT) -> None:
    shapes = {weight.path: tuple(weight.shape) for weight in model.weights}
    stated = sizes.shapes()
    kernel, _ = sizes.block_kernel()
    blocks = {path for path in shapes if path.endswith(kernel)}
    for path in sorted(stated.keys() | blocks):
        if shapes.get(path) != stated.get(path):
            raise ValueError(
                f"config must be that of the model, got {path} of {stated.get(path)} in the "
                f"configuration and {shapes.get(path)} in the model."
            )


def _family(name: str) -> type[BERT]:
    if name not in FAMILIES:
        raise ValueError(f"Unknown family {name!r}. Known: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def _local(path: str | os.PathLike) -> str | os.PathLike:
    """The directory of a repository's files, any other path as it is."""
    return download_model(path) if is_repository(path) else path


def _read_config(config: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(_local(config))
    if path.is_dir():
        present = [path / name for name in CONFIG_FILES if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(CONFIG_FILES)}.")
        path = present[0]
    if not path.is_file():
        raise FileNotFoundError(f"No configuration {path}: neither a file nor a directory.")
    return json.loads(path.read_text(encoding="utf-8"))
