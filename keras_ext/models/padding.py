"""The id that a tokenizer pads with, where its files lie beside a configuration.

Some configurations are wrong about it: multilingual-e5 says 0, and its tokenizer pads with 1.
What the tokenizer writes is what the model has to mask.

Files, in this order: `tokenizer_config.json` and `special_tokens_map.json` name the token;
the former, `added_tokens.json`, `tokenizer.json` and `vocab.txt` give its id.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_ext.models.family import Sizes

NAMES = ("[PAD]", "<pad>")  # where no file names the token


def tokenizer_padding(directory: str | os.PathLike) -> tuple[int, str] | None:
    """The id of padding and the file that says so; None where no file does.

    Args:
        directory: with the files of a tokenizer, or without.

    Example:
        >>> Path("tokenizer").mkdir()
        >>> _ = Path("tokenizer/vocab.txt").write_text("[UNK]\\n[PAD]\\n")
        >>> tokenizer_padding("tokenizer")
        (1, 'vocab.txt')
    """
    directory = Path(directory)
    settings = _read(directory, "tokenizer_config.json")
    special = _read(directory, "special_tokens_map.json")
    name = _content(settings.get("pad_token") or special.get("pad_token"))
    names = (name,) if name else NAMES
    found = ((i, file) for token, i, file in _tokens(directory, settings) if token in names)
    return next(found, None)


def padded_as_tokenizer(sizes: Sizes, directory: str | os.PathLike) -> Sizes:
    """The sizes with the padding of the tokenizer in their directory, and a warning where the
    configuration there says otherwise.

    Raises:
        ValueError: they differ, and positions are counted from the padding of the
            configuration, so that no id could stand for both.
    """
    if not hasattr(sizes, "pad_token_id"):
        return sizes
    padding, file = tokenizer_padding(directory) or (sizes.pad_token_id, "")
    if padding == sizes.pad_token_id or padding >= sizes.vocab_size:
        return sizes
    if sizes.counts_from_padding:
        raise ValueError(
            f"The configuration in {directory} pads with id {sizes.pad_token_id}, from which "
            f"positions are counted, the tokenizer ({file}) with {padding}. Correct the one "
            "that is wrong."
        )
    warnings.warn(
        f"The configuration in {directory} pads with id {sizes.pad_token_id}, the tokenizer "
        f"({file}) with {padding}, which is taken. Correct pad_token_id in the configuration.",
        stacklevel=3,
    )
    return dataclasses.replace(sizes, pad_token_id=padding)  # type: ignore[call-arg]


def _tokens(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Tokens that may be padding, their ids, and the files of those."""
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        yield _content(token), int(number), "tokenizer_config.json"
    for content, number in _read(directory, "added_tokens.json").items():
        yield content, number, "added_tokens.json"
    whole = _read(directory, "tokenizer.json")
    for token in whole.get("added_tokens") or ():
        yield token["content"], token["id"], "tokenizer.json"
    if padding := whole.get("padding"):
        yield padding["pad_token"], padding["pad_id"], "tokenizer.json"
    vocabulary = directory / "vocab.txt"
    if vocabulary.is_file():
        lines = vocabulary.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines):
            yield line.strip(), number, "vocab.txt"


def _content(token: Any) -> str:
    """A token as it is written, or described by its content and how it is cut."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _read(directory: Path, name: str) -> dict[str, Any]:
    file = directory / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
