"""Whether a name that stands in a text is all of a name there, or a part of a longer one: told by the words beside it.

"Paris" is a part of "Paris Hilton", "Queensland" of "Premier of Queensland", "iPhone" of "iPhone 5", and, where nothing is asked by it,
"nebula" of "Dark nebula is". The first word of a sentence is always a capital, and in a text that was typed without capitals none says
anything; whether such a word belongs to a name is told by how it is usually written (`Writing`), and by where a sentence opens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

# Words that may open an English sentence right before a name and are no part of it: what else opens a statement is.
OPENERS = frozenset(
    """
    a about above according across after against all along also although am among an and another any are around as ask at be because
    been before being between beyond both but by can compare concerning consider could define describe despite did discuss do does
    during each either every except explain find for from give had has have having he how i identify if in inside into introduce is
    it just like list locate may mention might must my name near neither no nor not now of off on once only onto or our over past per
    please recall regarding remember say shall she should show since so some state still suggest summarise summarize tell than that
    the their then there these they this those though through throughout till to toward towards translate under unless until up upon
    via was we were what when where whereas whether which while who whom whose why will with within without would write yes yet you
    your
    """.split()  # noqa: SIM905 - as people read it
)
_LINKS = "of|de|del|della|di|da|do|dos|du|des|van|von|zu|bin|ibn"
_ARTICLES = "the|la|las|los|les|der|den|het"
_LINK = rf"(?P<link>\s+(?:{_LINKS})(?:\s+(?:{_ARTICLES}))?)?(?:\s+|-)"
# The words beside a name are looked for no further away than this.
_NEAR = 80
_WORD_BEFORE = re.compile(rf"(?P<word>(?<![\w.&'’-])[^\W_][\w.&'’-]*?){_LINK}$")
_WORD_AFTER = re.compile(rf"{_LINK}(?P<word>[^\W_][\w&-]*)")
# A full stop or an apostrophe goes on with a word as in "L.F.C." and "L'Abbaye", but not in "Ada's".
_GOES_ON = re.compile(r"(?:[.&]|['’](?!(?:s|re|ll|d|ve|m|t)\b))?(?P<next>[^\W_])")
_SIGNS = " .!:;'’\"”»)…"
_ARTICLE_OF_A_NAME = re.compile(r"(?:al|el|ad|as|ash|an|ar)-")
_ENDS_BEFORE = frozenset('.?!:;"“”«(')
_POSSESSIVE = ("'s", "’s", "s'", "s’")

Writing = Callable[[str], bool]
"""Whether a word with a capital is usually written with one."""
Explained = Callable[[int, int], bool]
"""Whether the word at these characters is one of the relation that is asked about, and so no part of a name."""


class Standing(Enum):
    """How a name stands in a text."""

    WHOLE = "whole"
    PART_OF_A_NAME = "part of a longer name"
    PART_OF_A_WORD = "part of a longer word"
    UNTOLD = "in a script that has no capitals, and often no spaces: nothing tells"


def standing(
    text: str, start: int, end: int, *, has_capitals: bool, writing: Writing, explained: Explained
) -> Standing:
    """How the name at `text[start:end]` stands.

    Args:
        text: All of it.
        start: Where the name begins.
        end: Where it ends.
        has_capitals: Whether the capitals are the author's; else they were put there for every word.
        writing: How a word is usually written.
        explained: Whether a word beside the name is told by what is asked: in "Capital of Norway?" it is.
    """
    goes_on = _GOES_ON.match(text, end)
    inside = text[start - 1 : start]
    for letter in (goes_on["next"] if goes_on else "", inside):
        if letter.isalnum():
            return Standing.PART_OF_A_WORD if _tells(letter) else Standing.UNTOLD

    def is_name(word: str) -> bool:
        return word[0].isupper() and (has_capitals or writing(word))

    def is_capital(word: str, at: int) -> bool:
        """Whether the author wrote it so because it belongs to a name."""
        if not any(map(str.isupper, _ARTICLE_OF_A_NAME.sub("", word).partition("-")[0])):
            return False
        # Nobody begins a sentence with two capitals in a word that is no name.
        is_told = has_capitals and (not _opens(text, at) or any(map(str.isupper, word[1:])))
        return is_told or writing(word)

    before = _WORD_BEFORE.search(text[max(0, start - _NEAR) : start])
    if before is not None:
        word, at = before["word"], max(0, start - _NEAR) + before.start("word")
        opens, links = _opens(text, at), before["link"] is not None
        is_part = is_capital(word, at) or (opens and word[0].isdigit())  # "2008 Oslo attack", but not "in 2008 Oslo"
        if opens and not links and not text[-_NEAR:].rstrip(_SIGNS).endswith("?") and word.casefold() not in OPENERS:
            # A statement opens with what it is about, unless a common word comes before a name: "player Paul McCartney".
            is_part |= not is_name(text[start:end]) or (has_capitals and word[0].isupper())
        if is_part and not word.endswith(_POSSESSIVE) and not explained(at, at + len(word)):
            return Standing.PART_OF_A_NAME
    after = _WORD_AFTER.match(text, end)
    if after is not None and (after["word"][0].isdigit() or is_capital(after["word"], after.start("word"))):
        return Standing.PART_OF_A_NAME
    return Standing.WHOLE


def _opens(text: str, at: int) -> bool:
    """Whether a sentence begins at `at`."""
    before = text[max(0, at - _NEAR) : at].rstrip()
    return not before or before[-1] in _ENDS_BEFORE


def _tells(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper()
