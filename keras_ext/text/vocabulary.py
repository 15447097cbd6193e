"""A WordPiece vocabulary from texts: characters, and the frequent words of other scripts.

Chinese words are single characters for a WordPiece tokenizer, so their vocabulary is a
count. Other words (Latin, digits) come whole where they are frequent, and by their letters,
as first letter and as "##" letter, so that rare words are spelt and not lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from keras_ext.text.tokenizer import SPECIAL_TOKENS, import_tokenizers


def build_vocabulary(
    texts: Iterable[str],
    *,
    min_count: int = 2,
    word_min_count: int = 10,
    lowercase: bool = True,
) -> list[str]:
    """The tokens of `texts`, by falling frequency after the special tokens.

    Ties are in the order of code points: the same texts give the same ids.

    Args:
        texts: the texts to count.
        min_count: keep a character from so many occurrences on. Default: 2.
        word_min_count: keep a word of several letters from so many on. Default: 10.
        lowercase: count lower-cased text without accents, for a tokenizer that does so.

    Returns:
        Tokens whose index is their id: [PAD], [UNK], [CLS], [SEP], [MASK], then the rest.

    Example:
        >>> tokens = build_vocabulary(["今天天气不错", "天天"], min_count=2)
        >>> tokens[5:]
        ['天']
        >>> tokenizer = WordPieceTokenizer(tokens)
    """
    library = import_tokenizers()
    normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    splitter = library.pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(
            word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        )
    kept = {token: n for token, n in _count_characters(words).items() if n >= min_count}
    kept |= {word: n for word, n in words.items() if len(word) > 1 and n >= word_min_count}
    return [*SPECIAL_TOKENS, *sorted(kept, key=lambda token: (-kept[token], token))]


def _count_characters(words: Counter[str]) -> Counter[str]:
    """Occurrences of every character as the first of a word, and with "##" inside one."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        counts[word[0]] += count
        for character in word[1:]:
            counts[f"##{character}"] += count
    return counts
