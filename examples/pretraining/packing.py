"""Plain text to rows of one length, with a mark where each word starts.

    [CLS] text of a document [SEP] text of the next one and so on [SEP]

The token ids of all documents are one stream, which is cut every length - 2 tokens: nothing is
lost, and only the last row has padding. A row may start within a sentence, or a word.

Words are those of a segmenter, such as jieba. A piece starts a word where it lies in another
word of the segmenter than the piece before, unless it continues a piece ("##"). Special tokens
are words of their own.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from errors import UserError

from keras_ext.text import WordPieceTokenizer
from keras_ext.text.tokenizer import SPECIAL_TOKENS

CHUNK = 1000  # lines that are tokenized at a time


def read_lines(paths: Iterable[str]) -> list[str]:
    """The lines of all files, with one empty line between documents.

    Args:
        paths: files, of which blank lines and the end end a document, and directories of
            such files.

    Raises:
        UserError: a file is missing or not UTF-8, or there is no text.
    """
    lines: list[str] = []
    for path in _files(paths):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: give text files by --text") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): convert it") from None
        for line in (*text.split("\n"), ""):
            line = line.strip()
            if line or (lines and lines[-1]):
                lines.append(line)
    if not lines:
        raise UserError(f"{', '.join(paths)}: no text in there")
    return lines


def import_segmenter() -> Callable[[str], list[str]]:
    """The function of jieba that cuts a text into words.

    Raises:
        UserError: jieba is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own code, on newer Pythons
            import jieba
    except ImportError:
        raise UserError(
            "whole words need jieba: pip install 'keras-ext[pretraining]'"
        ) from None
    jieba.setLogLevel("ERROR")
    return jieba.lcut


def pack(
    lines: list[str],
    tokenizer: WordPieceTokenizer,
    segment: Callable[[str], list[str]],
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32, and where words start, bool; both (rows, length).

    Args:
        lines: as of `read_lines`.
        segment: text -> its words, which joined are the text again.
        length: tokens of a row, special ones included.
    """
    parts = zip(*_tokens(lines, tokenizer, segment), strict=True)
    # Without the [SEP] of the last document: its row has one.
    ids, starts = (np.concatenate(part)[:-1] for part in parts)
    room = length - 2
    count = max(1, -(-len(ids) // room))
    rows = np.zeros((count, length), "int32")
    rows[:, 0], rows[:, -1] = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    rows[:, 1:-1] = np.resize(ids, (count, room))
    row_starts = np.zeros(rows.shape, bool)
    row_starts[:, 1:-1] = np.resize(starts, (count, room))
    filled = len(ids) - (count - 1) * room  # of the last row
    rows[-1, 1 + filled] = rows[-1, -1]
    rows[-1, 2 + filled :] = 0
    special = np.isin(rows, [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS])
    row_starts |= special
    row_starts[:, 1:] |= special[:, :-1]
    return rows, row_starts


def _tokens(lines, tokenizer, segment) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and starts of words, line by line; an empty line is [SEP]."""
    continues = np.array([token.startswith("##") for token in tokenizer.vocabulary])
    end = np.array([tokenizer.token_to_id("[SEP]")], "int32"), np.array([True])
    for first in range(0, len(lines), CHUNK):
        chunk = lines[first : first + CHUNK]
        for line, encoding in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            if not line:
                yield end
                continue
            words = segment(line)
            word_of = np.repeat(np.arange(len(words)), [len(word) for word in words])
            ids = np.array(encoding.token_ids[1:-1], "int32")
            places = np.array([start for start, _ in encoding.offsets[1:-1]], int)
            yield ids, (np.diff(word_of[places], prepend=-1) != 0) & ~continues[ids]


def _files(paths: Iterable[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        else:
            yield path
