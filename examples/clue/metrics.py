"""Official scores of CMRC2018: exact match and F1, of the answer that fits best.

    EM = 1 if prediction and answer are equal, else 0
    F1 = 2 P R / (P + R),    P = L / |prediction|,    R = L / |answer|

Both texts are lower-cased, stripped of spaces at the ends and of the punctuation listed below.
For F1 they are cut into units: a Chinese character is one, what stands between two of them is
cut into words by NLTK. L is the length of the longest run of units that both have in common
(contiguous, though the official script calls it LCS); F1 is 0 where L is.

The official script (cmrc2018_evaluate.py) cuts by `nltk.word_tokenize`, which first looks for
sentences, with data to be downloaded. Here they are cut by the words part of it alone, which
differs only inside Latin text of several sentences.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import lru_cache

from nltk.tokenize import NLTKWordTokenizer

PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
CHINESE_OR_OTHERS = re.compile("[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")

# 0.2 ms a call, and most numbers and names come again, also with every epoch.
to_words = lru_cache(maxsize=2**16)(NLTKWordTokenizer().tokenize)


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction equals one of the answers, otherwise 0.0."""
    return float(plain(prediction) in map(plain, answers))


def f1_score(prediction: str, answers: Iterable[str]) -> float:
    """The highest F1 of the prediction with any of the answers, in [0, 1]."""
    units = to_units(prediction)
    return max(_f1(units, to_units(answer)) for answer in answers)


def plain(text: str) -> str:
    """The text in lower case and without the punctuation that does not count."""
    return text.lower().strip().translate(PUNCTUATION)


def to_units(text: str) -> list[str]:
    """Chinese characters, and words of what stands between them."""
    units = []
    for part in CHINESE_OR_OTHERS.findall(plain(text)):
        units += [part] if "\u4e00" <= part[0] <= "\u9fa5" else to_words(part)
    return units


def _f1(prediction: list[str], answer: list[str]) -> float:
    matcher = SequenceMatcher(None, prediction, answer, autojunk=False)
    common = matcher.find_longest_match().size
    # P = L / |p| and R = L / |a| make 2 P R / (P + R) = 2 L / (|p| + |a|).
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0
