"""Tokenizer and encoder: of a pretrained model's directory, or small ones from scratch."""

import json
from pathlib import Path
from typing import Any

import keras
from data import TaskData
from errors import UserError
from keras import ops
from settings import Settings

from keras_ext import layers
from keras_ext.models import build_transformer_model, replace_attention
from keras_ext.text import WordPieceTokenizer, build_vocabulary

HEAD_SIZE = 64  # width of an attention head from scratch, as in BERT
# What a family does here, if not what it does by default; a GPT sees no later tokens.
APPLICATIONS = {"t5": "encoder", "mt5": "encoder"}
# In the place of softmax attention, with its projections.
ATTENTIONS = {
    "linear": layers.LinearAttention,
    "favor": layers.FavorAttention,
    "polynomial": layers.PolynomialAttention,
}


def build(
    config: dict[str, Any], settings: Settings, data: TaskData
) -> tuple[WordPieceTokenizer, keras.Model]:
    """The tokenizer, and the model `[token_ids, segment_ids]` -> (batch, length, hidden).

    Raises:
        UserError: files are missing, or do not fit each other.
    """
    lowercase = False if config["cased"] else None
    family = config["family"]
    try:
        if config["model"] is None:
            vocabulary = config["vocab"]
            tokenizer, encoder = _from_scratch(vocabulary, family, lowercase, settings, data)
        else:
            directory = Path(config["model"])
            tokenizer, encoder = _pretrained(directory, family, lowercase, settings)
    except (OSError, ValueError) as error:
        # Causes are told over several lines where there are several.
        raise UserError(" ".join(str(error).split())) from error
    if settings.attention != "softmax":
        kind = ATTENTIONS[settings.attention]
        encoder = replace_attention(encoder, lambda old: kind(old.num_heads, old.key_dim))
    return tokenizer, _with_segments(encoder, settings)


def _with_segments(encoder: keras.Model, settings: Settings) -> keras.Model:
    """The encoder with an input of segments, and the mask of padding, if it has none."""
    if len(encoder.inputs) == 2:
        return encoder
    if encoder.get_layer("encoder_0").attention.causal and settings.pooling == "first":
        raise UserError(
            "the first token of a GPT sees no other: give --pooling last (or mean, or max)"
        )
    (token_ids,) = encoder.inputs
    segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
    hidden = layers.WithMask()([encoder.output, ops.not_equal(token_ids, 0)])
    model = keras.Model([token_ids, segment_ids], hidden, name=encoder.name)
    model.checkpoint_report = getattr(encoder, "checkpoint_report", None)
    return model


def small_bert(
    tokens: int, layers: int, hidden: int, positions: int, dropout: float
) -> dict[str, Any]:
    """The configuration of a BERT with the proportions of the published ones."""
    return {
        "vocab_size": tokens,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // HEAD_SIZE),
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": positions,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def _pretrained(
    directory: Path, family: str | None, lowercase: bool | None, settings: Settings
) -> tuple[WordPieceTokenizer, keras.Model]:
    sizes_file = _first_of(directory, "bert_config.json", "config.json")
    sizes = json.loads(sizes_file.read_text(encoding="utf-8"))
    vocabulary = _first_of(directory, "tokenizer.json", "vocab.txt")
    tokenizer = WordPieceTokenizer(vocabulary, lowercase)
    encoder = build_transformer_model(
        sizes,
        directory,
        family,
        application=APPLICATIONS.get(family or sizes.get("model_type")),
        dropout=settings.dropout,
        attention_dropout=settings.dropout,
    )
    embedding, padding = encoder.get_layer("token_embedding"), tokenizer.token_to_id("[PAD]")
    if padding != 0 or (embedding.mask_zero and embedding.padding_id != 0):
        raise ValueError(
            f"batches here are padded with id 0, but {vocabulary} pads with {padding} and "
            f"{sizes_file} with {embedding.padding_id}: take another model."
        )
    if len(tokenizer.vocabulary) > sizes["vocab_size"]:
        raise ValueError(
            f"{vocabulary} has {len(tokenizer.vocabulary)} tokens, but vocab_size in "
            f"{sizes_file} is {sizes['vocab_size']}: put the vocabulary of the model there."
        )
    for layer in encoder.layers:  # other positions have no limit
        if layer.name == "position_embedding" and settings.max_length > layer.max_length:
            raise ValueError(
                f"--max-length {settings.max_length} exceeds max_position_embeddings "
                f"{layer.max_length} in {sizes_file}: give at most that."
            )
    return tokenizer, encoder


def _from_scratch(
    vocabulary: str | None,
    family: str | None,
    lowercase: bool | None,
    settings: Settings,
    data: TaskData,
) -> tuple[WordPieceTokenizer, keras.Model]:
    if vocabulary is not None and not Path(vocabulary).is_file():
        raise FileNotFoundError(f"{vocabulary} is missing: give another --vocab, or none.")
    tokens = vocabulary or build_vocabulary(data.train.texts(), lowercase=lowercase is None)
    tokenizer = WordPieceTokenizer(tokens, lowercase)
    sizes = small_bert(
        len(tokenizer.vocabulary),
        settings.layers,
        settings.hidden,
        positions=settings.max_length,
        dropout=settings.dropout,
    )
    application = APPLICATIONS.get(family)
    return tokenizer, build_transformer_model(sizes, model=family, application=application)


def _first_of(directory: Path, *names: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(
        f"{directory} holds neither {' nor '.join(names)}: "
        "give the directory of a pretrained BERT by --model."
    )
