"""Build a Transformer by its configuration file, load its checkpoint, save it.

Each family of models is one file: how its configuration is read, what it is built of, and how
its weights are named in checkpoints; see `family.py`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from keras_ext.layers.blocks import blocks
from keras_ext.models.adapter import check_not_quantized
from keras_ext.models.checkpoints import (
    CheckpointReport,
    load_weights,
    save_weights,
    uninitialized,
)
from keras_ext.models.family import OURS, Family, known_family
from keras_ext.models.graphs import check_graph
from keras_ext.models.hub import download_model, is_repository
from keras_ext.models.padding import padded_as_tokenizer
from keras_ext.models.record import family_of

CONFIG_FILES = ("bert_config.json", "config.json")
# Fields of any family that change what the same weights compute, and no shape of them.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "head_size", "pad_token_id")


def build_transformer_model(
    config: str | os.PathLike | Mapping[str, Any],
    checkpoint: str | os.PathLike | None = "auto",
    model: str | type[Family] | None = None,
    *,
    application: str | None = None,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    recompute: bool = False,
    custom_position_ids: bool | None = None,
    **heads: bool | str,
) -> keras.Model:
    """Build a Transformer as a functional Keras model and load its checkpoint.

    The model maps `[token_ids, segment_ids]`, int32 of (batch, length), where the padding's
    id (0, or `pad_token_id` of the configuration) is masked, to the last hidden states (batch,
    length, hidden), or to a list: those, then the outputs of the heads asked for, in the order
    below. GPTs have no segments and no padding, ModernBERTs and RoBERTas no segments, T5s
    neither, but `decoder_token_ids` (see `T5`). Where a tokenizer beside the configuration
    pads with another id, its id is taken, with a warning.

        with_mlm              logits of the masked language model, or of the next token,
                              (batch, length, vocabulary)
        with_nsp              logits of next-sentence prediction, of ALBERT of the order of
                              sentences, (batch, 2)
        with_pool             tanh(h_0 W + b) of the first token, (batch, hidden)
        with_discriminator    logits of ELECTRA, positive where a token is replaced,
                              (batch, length)

    Under the policies mixed_bfloat16 and mixed_float16 the hidden states, of about unit size,
    are within 0.1 and 0.02 of those in float32 (small random models of every kind).

    Args:
        config: a JSON file, a directory with `bert_config.json` or `config.json`, the id of a
            repository of huggingface.co or a name that it knows (see `download_model`), or a
            dict.
        checkpoint: prefix or directory of a TensorFlow checkpoint, directory or repository of
            a Hugging Face model, or a file of its weights (safetensors, `pytorch_model.bin`, of
            which nothing is run); None for fresh weights. Default: "auto", the weights in the
            directory or repository of `config`; fresh ones for a file or dict.
        model: the family: "albert", "bert" (also RoBERTa-wwm, MacBERT, RBT3), "camembert",
            "electra", "electra_generator", "gau_alpha", "gpt2" (also CPM), "gpt2_ml",
            "modernbert", "mt5", "nezha", "openai-gpt", "roberta", "roformer", "roformer_v2",
            "t5", "tta" or "xlm-roberta", or a subclass of `Family`. Default: what the
            configuration says, or "bert" where it says nothing.
        application: "encoder", "lm" (tokens see no later ones) or "unilm" (nor do those of
            segment 1; those of segment 0 see each other); of a GPT "lm"; of a T5 "seq2seq",
            "encoder" or "decoder". Default: that of the configuration, or the first of these.
        dropout: rate on embeddings and sublayer outputs. Default: that of the configuration.
        attention_dropout: rate on attention weights. Default: that of the configuration.
        recompute: gradient checkpointing, as of `TransformerBlock`, in all blocks. Default:
            False.
        custom_position_ids: a further input `position_ids`, int32 (batch, length), the last of
            them, says where tokens stand. Default: that of the configuration, or False.
        **heads: which of the heads above to add; `with_pool` may be "linear", without the tanh.
            Default: none.

    Returns:
        A `keras.Model`; with a checkpoint, `model.checkpoint_report` tells what became of every
        variable and weight. Weights that the checkpoint lacks are warned about.

    Raises:
        ValueError: the family is unknown or has no such head, the configuration is incomplete
            or not of this family, or the checkpoint does not fit.
        TypeError: no family has such a head; one of bert4keras is told the way here.
        FileNotFoundError: configuration or checkpoint is absent.
        OSError: a repository cannot be reached.

    Example:
        >>> bert = build_transformer_model("chinese_L-12_H-768_A-12", with_pool=True)
        >>> hidden, pooled = bert([token_ids, segment_ids])
    """
    if not isinstance(config, Mapping):
        config = _local(config)
    if checkpoint == "auto":
        checkpoint = None
        if not isinstance(config, Mapping) and Path(config).is_dir():
            checkpoint = config
    fields = _read_config(config)
    family = _family(model, fields).from_config(fields)
    if not isinstance(config, Mapping):
        beside = Path(config) if Path(config).is_dir() else Path(config).parent
        family = padded_as_tokenizer(family, beside)
    options: dict[str, Any] = {
        "application": application,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": attention_dropout,
        "custom_position_ids": custom_position_ids,
    }
    given = {name: value for name, value in options.items() if value is not None}
    family = dataclasses.replace(family, **given)
    if checkpoint is None:
        transformer = family.build(**heads)
    else:
        checkpoint = _local(checkpoint)
        with uninitialized():
            transformer = family.build(**heads)
            report = load_weights(transformer, checkpoint, family.names)
        transformer.checkpoint_report = report
    for block in blocks(transformer) if recompute else []:
        block.recompute = True
    return transformer


def load_checkpoint(model: keras.Model, checkpoint: str | os.PathLike) -> CheckpointReport:
    """Load a checkpoint into a model that was built here, or around one that was.

    Weights are found by the names of their layers, so further layers may have been added.

    Args:
        model: the model; nothing of it is changed where an error is raised.
        checkpoint: as in `build_transformer_model`.

    Returns:
        The `CheckpointReport` of everything loaded, ignored and fresh.

    Raises:
        ValueError: shapes differ, nothing fits, the model is of no family (`family_of`), or a
            configuration beside the weights says that they are of other heads or activations.
        FileNotFoundError: the checkpoint is absent.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> print(load_checkpoint(bert, "bert_model.ckpt"))
        bert_model.ckpt: 21 weights loaded, 2 variables ignored, 0 weights fresh
          ignored 2: not in the model
    """
    checkpoint, sizes = _local(checkpoint), family_of(model)
    if any((Path(checkpoint) / name).is_file() for name in CONFIG_FILES):
        # UER keeps the size of the vocabulary apart.
        config = {"vocab_size": sizes.vocab_size, **_read_config(checkpoint)}
        theirs = padded_as_tokenizer(type(sizes).from_config(config), checkpoint)
        _check_unseen(sizes, theirs, checkpoint)
    return load_weights(model, checkpoint, sizes.names)


def save_transformer_model(model: keras.Model, directory: str | os.PathLike) -> None:
    """Write a model as a Hugging Face directory: `model.safetensors` and `config.json`.

    `build_transformer_model(directory)` reads it, and so does `transformers`, if its
    configurations can say what the model is. Where they cannot (a language model or UniLM of an
    encoder's weights, another attention, shared blocks), `model_type` is one of ours, which
    transformers refuses. Each file is replaced when its successor is complete, so that a crash
    leaves none half-written.

    Args:
        model: a model that was built here, with any heads of its family, also after surgery.
            Weights are written in the dtype they have, adapters merged into them.
        directory: where to; made if need be.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: the model has weights that no layer of the family has, or is not what the
            family builds from its sizes, or is quantised, or the directory holds files that
            are read instead.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> save_transformer_model(bert, "saved")
        >>> same = build_transformer_model("saved")
    """
    sizes = family_of(model)
    directory = Path(directory)
    first, name = CONFIG_FILES
    if (directory / first).exists():
        raise ValueError(
            f"{directory} holds {first}, which would be read instead of what is saved now. "
            "Give another directory."
        )
    check_not_quantized(model, "A file of Hugging Face")
    check_graph(model, sizes)
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(model, directory, sizes.names["huggingface"])
    partial = directory / f"partial-{name}"
    partial.write_text(json.dumps(sizes.to_config(), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / name)


def _check_unseen(sizes: Family, theirs: Family, checkpoint: str | os.PathLike) -> None:
    """Refuse weights that would compute something else in the model, whatever their shapes."""
    for name in UNSEEN:
        mine, other = getattr(sizes, name, None), getattr(theirs, name, None)
        if mine != other:
            raise ValueError(
                f"{checkpoint} is of a model with {name}={other!r}, got a model with {mine!r}: "
                f"build_transformer_model({os.fspath(checkpoint)!r}) builds the right one."
            )


def _family(model: str | type[Family] | None, config: Mapping[str, Any]) -> type[Family]:
    if isinstance(model, type):
        if not issubclass(model, Family):
            raise TypeError(f"model must be a name or a subclass of Family, got {model!r}.")
        return model
    if model is not None:
        return known_family(model)
    family = known_family(str(config.get("model_type") or "bert").removeprefix(OURS))
    return family.for_architectures(config.get("architectures") or ())


def _local(path: str | os.PathLike) -> str | os.PathLike:
    """The directory of a repository's files, any other path as it is."""
    return download_model(path) if is_repository(path) else path


def _read_config(config: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if path.is_dir():
        present = [path / name for name in CONFIG_FILES if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(CONFIG_FILES)}.")
        path = present[0]
    if not path.is_file():
        raise FileNotFoundError(f"No configuration {path}: neither a file nor a directory.")
    return json.loads(path.read_text(encoding="utf-8"))
