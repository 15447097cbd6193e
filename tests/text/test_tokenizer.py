import itertools
import json
import sys

import pytest
import tokenizers

from keras_ext.text import WordPieceTokenizer, build_vocabulary
from keras_ext.text.tokenizer import longest_first

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气好，。！a"]
TOKENS += ["##b", "##c", "abc", "1", "##1", "[", "mask", "]"]
TEXTS = [
    "今天天气好，abc！",
    "abcb ABC 11",
    "a\u200bb 今\u3000天\u00a0气",
    "好[MASK] [mask]",
    "龙",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return WordPieceTokenizer(vocabulary)


def tokens(tokenizer, text):
    return [tokenizer.id_to_token(token) for token in tokenizer.encode(text).token_ids]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # What transformers.BertTokenizerFast 5.23 gives with this vocabulary.
        ("今天天气好，abc！", "今 天 天 气 好 ， abc ！"),
        ("abcb ABC 11", "abc ##b abc 1 ##1"),
        ("a\u200bb", "a ##b"),
        ("今\u3000天\u00a0气\t好\n", "今 天 气 好"),
        ("a\x00\x07b", "a ##b"),
        ("ábc", "abc"),
        ("好[MASK]好", "好 [MASK] 好"),
        ("[mask]", "[ mask ]"),
        ("龙xyz abz", "[UNK] [UNK] [UNK]"),
        ("a" + "b" * 100, "[UNK]"),
        ("", ""),
        (" \u200b", ""),
    ],
)
def test_tokens(tokenizer, text, expected):
    assert tokens(tokenizer, text) == ["[CLS]", *expected.split(), "[SEP]"]


def test_case_is_kept_on_request(vocabulary):
    cased = WordPieceTokenizer(vocabulary, lowercase=False)
    assert tokens(cased, "abc ABC") == ["[CLS]", "abc", "[UNK]", "[SEP]"]


def test_offsets_are_character_spans(tokenizer):
    text = "今天，ABC！ 龙"
    encoding = tokenizer.encode(text)
    spans = [text[start:end] for start, end in encoding.offsets]
    assert spans == ["", "今", "天", "，", "ABC", "！", "龙", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text_in_order(tokenizer, text):
    offsets = tokenizer.encode(text).offsets[1:-1]
    assert all(start < end for start, end in offsets)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(offsets))


def test_pairs_have_two_segments(tokenizer):
    ids, segments, offsets = tokenizer.encode("今天", "好！")
    assert [tokenizer.id_to_token(i) for i in ids] == [
        "[CLS]",
        *"今天",
        "[SEP]",
        *"好！",
        "[SEP]",
    ]
    assert segments == [0, 0, 0, 0, 1, 1, 1]
    assert offsets == [(0, 0), (0, 1), (1, 2), (0, 0), (0, 1), (1, 2), (0, 0)]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((6, 2), (3, 2)), ((2, 6), (2, 3)), ((5, 5), (2, 3)), ((1, 1), (1, 1))],
)
def test_the_longer_text_is_truncated_first(tokenizer, lengths, kept):
    encoding = tokenizer.encode("天" * lengths[0], "好" * lengths[1], max_length=8)
    days, good = (tokenizer.token_to_id(token) for token in "天好")
    assert (encoding.token_ids.count(days), encoding.token_ids.count(good)) == kept
    assert len(encoding.token_ids) <= 8


@pytest.mark.parametrize("room", range(10))
def test_longest_first_is_the_library_s(tokenizer, room):
    pair_of = {(a, b): ("天" * a, "好" * b) for a in range(7) for b in range(7)}
    library = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    library.enable_truncation(room, strategy="longest_first")
    for (first, second), pair in pair_of.items():
        kept = library.encode(*pair, add_special_tokens=False).sequence_ids
        assert longest_first(first, second, room) == (kept.count(0), kept.count(1))


def test_single_texts_are_cut_at_their_end(tokenizer):
    whole, cut = tokenizer.encode("今天天气好"), tokenizer.encode("今天天气好", max_length=4)
    assert cut.token_ids == [*whole.token_ids[:3], whole.token_ids[-1]]
    assert cut.offsets == [*whole.offsets[:3], (0, 0)]


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    pairs = TEXTS[::-1]
    batch = tokenizer.encode_batch(TEXTS, pairs, max_length=9)
    single = [tokenizer.encode(a, b, max_length=9) for a, b in zip(TEXTS, pairs, strict=True)]
    assert batch == single


def test_tokens_in_a_list_are_a_vocabulary(tokenizer):
    assert WordPieceTokenizer(TOKENS).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_tokenizer_json_equals_the_vocabulary(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer._tokenizer.save(str(path))
    assert WordPieceTokenizer(path).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    with pytest.raises(ValueError, match="states its own normalisation"):
        WordPieceTokenizer(path, lowercase=True)


def test_line_separators_are_tokens_not_line_ends(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*TOKENS, "\u2028", "尾"]), encoding="utf-8")
    tokenizer = WordPieceTokenizer(path)
    assert tokenizer.token_to_id("尾") == len(TOKENS) + 1
    assert tokenizer.vocabulary == [*TOKENS, "\u2028", "尾"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[CLS]\n天\n", r"lacks \[UNK\], \[SEP\]"),
        ("天\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"must have id 0.* it has 1"),
    ],
)
def test_bad_vocabularies(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        WordPieceTokenizer(path)


def test_other_tokenizer_types_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ValueError, match="of type WordPiece, got BPE"):
        WordPieceTokenizer(path)


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match="at least 3"):
        tokenizer.encode("今", "天", max_length=2)
    with pytest.raises(ValueError, match="pairs has 1 entries and texts 2"):
        tokenizer.encode_batch(["今", "天"], ["好"])


def test_missing_library_is_named(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-ext\[nlp\]'"):
        WordPieceTokenizer(vocabulary)


def test_built_vocabulary_spells_rare_words():
    texts = ["今天天气", "Keras ok", "ok ok 今"]
    vocabulary = build_vocabulary(texts, min_count=1, word_min_count=3)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "ok" in vocabulary
    assert "keras" not in vocabulary
    tokenizer = WordPieceTokenizer(vocabulary)
    assert tokens(tokenizer, "今Keras ok")[1:-1] == [*"今k", "##e", "##r", "##a", "##s", "ok"]
    unknown = tokenizer.token_to_id("[UNK]")
    assert all(unknown not in encoding.token_ids for encoding in tokenizer.encode_batch(texts))


def test_built_vocabulary_is_by_frequency_then_code_point():
    assert build_vocabulary(["天气天今"], min_count=1)[5:] == ["天", "今", "气"]
    assert build_vocabulary(["天气天今"], min_count=2)[5:] == ["天"]
