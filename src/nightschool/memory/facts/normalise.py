"""The normalised forms of names, relations and sentences: what decides whether two of them are the same.

Only spelling is taken away: case, width and other compatibility forms of letters, spaces, underscores, quotes and
punctuation at the ends, and a leading article. Nothing is stemmed and nothing compared by likeness.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

from nightschool.memory.facts.words import SAME_RELATIONS

_ARTICLE = re.compile(r"(?:the|an|a) (?=\S)")
_SPACES = re.compile(r"[\s_]+")
_ENDS = " .,;:!?\"'“”‘’«»`()[]"
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def key_of(words: str) -> str:
    """The normalised form of a name or a value. Empty if nothing but punctuation is there."""
    if not words.isascii():
        words = unicodedata.normalize("NFKC", words)
    words = _SPACES.sub(" ", words.casefold())
    key = words.strip(_ENDS) or words.strip()
    return _ARTICLE.sub("", key, count=1) if key[:1] in "at" and _ARTICLE.match(key) else key


@lru_cache(maxsize=4096)
def relation_key_of(relation: str) -> str:
    """The normalised form of a relation: `placeOfBirth`, `place_of_birth` and `Place of birth` are one.

    So are the few ways of saying the same that `SAME_RELATIONS` lists.
    """
    key = key_of(_CAMEL.sub(" ", relation))
    return SAME_RELATIONS.get(key, key)


def sentence_key_of(sentence: str) -> int:
    """A number for a sentence: the same for sentences that differ in spelling alone (63 bits of BLAKE2b of its form)."""
    digest = blake2b(key_of(sentence).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
