"""The words and sentences of a text, normalised, in any language.

Unicode NFKC, curly quotes made straight, case folded, white space collapsed, punctuation at the edges of words dropped, English
articles dropped, and characters of Chinese and Japanese taken as words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from nightschool.data.match.tables import ARTICLES, word_list

_SPACED_MARKS = {ord(wide): f"{mark} " for wide, mark in zip("，、；。！？", ",,;.!?", strict=True)}
_STRAIGHT_MARKS = str.maketrans("’‘“”−", "''\"\"-")
EDGES = "\"'`.,:;!?…()[]{}<>«»„“”‘’*_~¿¡|–—"
_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
# A full stop after a capital and at most one more letter belongs to an initial or a title: J. R. R. Tolkien, Dr. No.
_SENTENCE_END = re.compile(r"\n+|(?:(?<![\s.][A-Z])(?<![\s.][A-Z][a-z])(?<!^[A-Z])(?<!^[A-Z][a-z])\.|[!?…])+(?:\s+|$)")


def words(text: str) -> list[str]:
    """The normalised words of a text. In `The answer is A.` the last word is not an article."""
    parts = tokens(text)
    following = [*parts[1:], ""][: len(parts)]
    found = [fold(token) for token, after in zip(parts, following, strict=True) if not _is_article(token, after)]
    return [word for word in found if word]


def sentences(text: str) -> list[str]:
    """The sentences of a text, also split at line ends, with their closing marks; blank ones are left out."""
    whole = clean(text).strip()
    found, start = [], 0
    for match in _SENTENCE_END.finditer(whole):
        found.append(whole[start : match.end()].strip())
        start = match.end()
    found.append(whole[start:].strip())
    return [sentence for sentence in found if words(sentence)]


def token_f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it occurs; 0…1."""
    shared = (Counter(answer) & Counter(expected)).total()
    return 2 * shared / (len(answer) + len(expected)) if shared else 0.0


def clean(text: str) -> str:
    """A text in one way of writing marks and thousands."""
    straight = unicodedata.normalize("NFKC", text.translate(_SPACED_MARKS)).translate(_STRAIGHT_MARKS)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", straight)


def tokens(text: str) -> list[str]:
    """The parts of a text between spaces, and each character of Chinese and Japanese."""
    return _CJK.sub(r" \1 ", clean(text)).split()


def fold(token: str) -> str:
    """A token without the punctuation at its edges, folded; a minus before a digit stays."""
    bare = token.strip(EDGES)
    return (bare if re.match(r"-\d", bare) else bare.strip("-" + EDGES)).casefold()


def _is_article(token: str, following: str) -> bool:
    return token.lstrip(EDGES).casefold() in ARTICLES and bool(fold(following))


_NEGATIONS = word_list(
    "not no never neither nor none nobody nothing cannot without except unlike nicht kein keine pas "
    "jamais nunca jamás niet geen inte ikke nie не нет"
)


def negated(found: Sequence[str]) -> bool:
    """Whether one of the words denies something."""
    return any(word in _NEGATIONS or word.endswith("n't") for word in found)
