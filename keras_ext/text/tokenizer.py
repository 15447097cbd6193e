"""WordPiece: text to token ids, with the character span of every token.

A word is cut greedily into the longest pieces of the vocabulary, from left to
right; pieces inside a word carry the prefix "##", and a word that cannot be cut
becomes one [UNK]. Before that the text is cleaned (control characters go, all
white space becomes a space), every Chinese character becomes a word, and
punctuation is cut off; lower-casing also strips accents. Full-width punctuation
is kept as it is.

The work is done by the `tokenizers` library, configured as Hugging Face's fast
BERT tokenizer; both give the same ids for any text.

Sources: Devlin et al. 2018, arXiv 1810.04805; Song et al. 2020 (fast WordPiece),
arXiv 2012.15524.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tokenizers

REQUIRED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SPECIAL_TOKENS = (*REQUIRED_TOKENS, "[MASK]")

NONE = (0, 0)  # the span of a special token


class Encoding(NamedTuple):
    """One encoded text or pair; the three lists have the same length.

    `token_ids[i]` stands for `text[start:end]` with `start, end = offsets[i]`, in
    characters of the first text where `segment_ids[i]` is 0 and of the second where
    it is 1. [CLS] and [SEP] have the empty span (0, 0).
    """

    token_ids: list[int]
    segment_ids: list[int]
    offsets: list[tuple[int, int]]


class WordPieceTokenizer:
    """Encode texts and pairs for BERT-family models.

    Args:
        vocabulary: a vocabulary file (one token a line, the line number is the id), the
            tokens themselves in a list, or a Hugging Face `tokenizer.json` of a WordPiece
            model.
        lowercase: lower-case and strip accents. Default: True for a vocabulary; a
            `tokenizer.json` states its own normalisation, and giving it is refused.

    Raises:
        ImportError: the `tokenizers` library is missing.
        ValueError: the file lacks [PAD], [UNK], [CLS] or [SEP], has [PAD] elsewhere
            than at id 0 (models take 0 for padding), or is no WordPiece tokenizer.

    Example:
        >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "天", "气"]
        >>> tokenizer = WordPieceTokenizer(tokens)  # or WordPieceTokenizer("vocab.txt")
        >>> tokenizer.encode("天气好", max_length=128).token_ids
        [2, 4, 5, 1, 3]
    """

    def __init__(self, vocabulary: str | Path | Sequence[str], lowercase: bool | None = None):
        if not isinstance(vocabulary, (str, Path)):
            self._tokenizer = _from_tokens(vocabulary, "the vocabulary", lowercase)
        elif Path(vocabulary).suffix == ".json":
            self._tokenizer = _from_json(Path(vocabulary), lowercase)
        else:
            tokens = _read_lines(Path(vocabulary))
            self._tokenizer = _from_tokens(tokens, vocabulary, lowercase)
        known = self._tokenizer.get_vocab()
        # So that they are recognised where a text spells them out.
        specials = [token for token in SPECIAL_TOKENS if token in known]
        self._tokenizer.add_special_tokens(specials)
        self._cls, self._sep = known["[CLS]"], known["[SEP]"]

    @property
    def vocabulary(self) -> list[str]:
        """The tokens; the index of a token is its id."""
        ids = self._tokenizer.get_vocab()
        tokens = [""] * (max(ids.values()) + 1)
        for token, index in ids.items():
            tokens[index] = token
        return tokens

    def token_to_id(self, token: str) -> int | None:
        """The id of `token`, or None where the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token with this id, or None where there is none."""
        return self._tokenizer.id_to_token(token_id)

    def encode(
        self, text: str, pair: str | None = None, *, max_length: int | None = None
    ) -> Encoding:
        """Encode `[CLS] text [SEP]`, or `[CLS] text [SEP] pair [SEP]`.

        Args:
            text: the first text.
            pair: the second text, or None.
            max_length: keep at most so many tokens, special ones included; the longer
                of two texts is cut first, at its end. Default: keep everything.
        """
        pairs = None if pair is None else [pair]
        return self.encode_batch([text], pairs, max_length=max_length)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """Encode many texts, or texts[i] with pairs[i], on all cores; see `encode`."""
        specials = 2 if pairs is None else 3
        if max_length is not None and max_length < specials:
            raise ValueError(
                f"max_length must be at least {specials}, the number of special tokens, "
                f"got {max_length}."
            )
        room = None if max_length is None else max_length - specials
        firsts = self._pieces(texts)
        if pairs is None:
            return [self._join(first, None, room) for first in firsts]
        if len(pairs) != len(texts):
            raise ValueError(
                f"pairs has {len(pairs)} entries and texts {len(texts)}: "
                "give one second text for each first text."
            )
        seconds = self._pieces(pairs)
        return [self._join(a, b, room) for a, b in zip(firsts, seconds, strict=True)]

    def _pieces(self, texts: Sequence[str]) -> list[tuple[list, list]]:
        """(ids, offsets) of every text, without special tokens."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def _join(
        self, first: tuple[list, list], second: tuple[list, list] | None, room: int | None
    ) -> Encoding:
        """Cut to `room` tokens and put the special ones around.

        The library could do both, but it also keeps what it cuts off, in all combinations:
        two long texts would take memory by the product of their lengths.
        """
        ids, offsets = first
        if second is None:
            token_ids = [self._cls, *ids[:room], self._sep]
            return Encoding(token_ids, [0] * len(token_ids), [NONE, *offsets[:room], NONE])
        keep, keep_second = longest_first(len(ids), len(second[0]), room)
        head = [self._cls, *ids[:keep], self._sep]
        tail = [*second[0][:keep_second], self._sep]
        return Encoding(
            head + tail,
            [0] * len(head) + [1] * len(tail),
            [NONE, *offsets[:keep], NONE, *second[1][:keep_second], NONE],
        )


def longest_first(first: int, second: int, room: int | None) -> tuple[int, int]:
    """How many of `first` and `second` tokens to keep in `room` places.

    Tokens are taken from the longer text until both are equal, then from both in turn; of
    an odd number the longer text keeps one more, the second where they were equal.

    Example:
        >>> longest_first(9, 2, 8), longest_first(9, 6, 7)
        ((6, 2), (4, 3))
    """
    if room is None or first + second <= room:
        return first, second
    kept = min(first, second, room // 2)
    return (kept, room - kept) if first <= second else (room - kept, kept)


def import_tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "WordPieceTokenizer needs the tokenizers library: pip install 'keras-ext[nlp]'"
        ) from error
    return tokenizers


def _read_lines(path: Path) -> list[str]:
    # Iterating the file cuts at line ends only; str.splitlines would also cut at U+2028 and
    # U+0085, which are tokens of some vocabularies, and shift all later ids.
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def _from_tokens(
    tokens: Sequence[str], source: str | Path, lowercase: bool | None
) -> tokenizers.Tokenizer:
    library = import_tokenizers()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _check_specials(vocabulary, source)
    tokenizer = library.Tokenizer(
        library.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=None,  # as lowercase
        lowercase=lowercase is not False,
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _from_json(path: Path, lowercase: bool | None) -> tokenizers.Tokenizer:
    if lowercase is not None:
        raise ValueError(
            f"lowercase={lowercase} cannot be applied to {path}, which states its own "
            "normalisation: leave lowercase out, or give the vocabulary file."
        )
    content = path.read_text(encoding="utf-8")
    kind = json.loads(content).get("model", {}).get("type")
    if kind != "WordPiece":
        raise ValueError(f"{path} must hold a tokenizer of type WordPiece, got {kind}.")
    tokenizer = import_tokenizers().Tokenizer.from_str(content)
    _check_specials(tokenizer.get_vocab(), path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_specials(vocabulary: dict[str, int], source: str | Path) -> None:
    missing = [token for token in REQUIRED_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)}: give a BERT vocabulary, one token a line."
        )
    if vocabulary["[PAD]"] != 0:
        raise ValueError(
            f"[PAD] must have id 0, which the models take for padding; "
            f"in {source} it has {vocabulary['[PAD]']}."
        )
