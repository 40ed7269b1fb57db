"""Lines of JSON that may hold certain words, found without reading the others as JSON: half a million in the time of a few thousand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

FOLDED = (
    "\u00df\u0130\u0149\u017f\u01f0\u1e96\u1e97\u1e98\u1e99\u1e9a\u1e9e\u212a\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06"
)
"""All characters beyond ASCII whose lower form has letters of ASCII in it, such as \u00df: a line that has one may hold any word."""
_RAW = re.compile(b"|".join(re.escape(one.encode()) for one in FOLDED))
_ESCAPED = re.compile(b"|".join(rb"\\u%04x" % ord(one) for one in FOLDED) + rb"|\\u00[0-7]", re.IGNORECASE)
_WORD_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_")
_ESCAPES = frozenset(b"bfnrt")


class WordLines:
    """Finds lines that may hold all of some words, each by itself and in whatever case. It never leaves out one that does.

    Args:
        words: In lower case, as `str.casefold` makes it. Those with letters beyond ASCII are not looked for.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = [word.encode() for word in dict.fromkeys(words) if word.isascii()]
        self._is_ordered = False

    def of(self, content: bytes) -> Iterator[bytes]:
        """Such lines of a file, which is in UTF-8, with or without escapes."""
        if not self._words:
            yield from content.splitlines()
            return
        lower = content.lower()
        if not self._is_ordered:
            # What is rare in one file will be rare in the next.
            self._words.sort(key=lower.count)
            self._is_ordered = True
        rarest, *others = self._words
        at = lower.find(rarest)
        while at >= 0:
            behind = at + len(rarest)
            if _stands_alone(lower, at, behind):
                begin, behind = lower.rfind(b"\n", 0, at) + 1, _end_of_line(lower, at)
                line = lower[begin:behind]
                if all(word in line for word in others):
                    yield content[begin:behind]
            at = lower.find(rarest, behind)
        yield from _folded(content)


def _folded(content: bytes) -> Iterator[bytes]:
    """Lines with characters whose lower form no search for bytes tells."""
    has_raw, has_escaped = not content.isascii(), b"\\" in content and b"\\u" in content
    if (has_raw and _RAW.search(content)) or (has_escaped and _ESCAPED.search(content)):
        for line in content.splitlines():
            if _RAW.search(line) or _ESCAPED.search(line):
                yield line


def _stands_alone(text: bytes, begin: int, end: int) -> bool:
    """Whether what stands there may be a word; an escape before it, as of a new line, is no part of it."""
    if end < len(text) and text[end] in _WORD_BYTES:
        return False
    if begin == 0 or text[begin - 1] not in _WORD_BYTES:
        return True
    is_escape = text[begin - 1] in _ESCAPES and text[begin - 2 : begin - 1] == b"\\"
    return is_escape or text[begin - 6 : begin - 4] == b"\\u"


def _end_of_line(text: bytes, at: int) -> int:
    found = text.find(b"\n", at)
    return len(text) if found < 0 else found
