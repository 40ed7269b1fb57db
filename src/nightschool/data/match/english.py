"""An English sentence as stems: one way of writing for numbers, units, dates, times, plurals, tenses, accents and initials."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

from nightschool.data.match.tables import (
    AUXILIARIES,
    MONTHS,
    NO_NAMES,
    NUMBERS,
    PLAIN_VERBS,
    READ_AS,
    SMALL_WORDS,
    UNITS,
)
from nightschool.data.match.text import clean

_MARKS = frozenset(",;:()")
_TOKEN = re.compile(r"h\d\d?:\d\d|-?\d+(?:\.\d+)?(?![\w@])|[^\W_](?:[\w'@.+#/-]*[\w+#])?|[,;:()]")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}
_REWRITTEN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<=\d)\s*([ap])\.?\s?m\b\.?", re.IGNORECASE), r" \1m"),
    (re.compile(r"\b([A-Z])\.\s?(?=[A-Z])"), r"\1 "),
    (re.compile(r"[°º]\s?C\b"), " degree celsius"),
    (re.compile(r"[°º]\s?F\b"), " degree fahrenheit"),
    (re.compile(r"[°º]"), " degree "),
    (re.compile(r"%"), " percent "),
    (re.compile(r"\bper cent\b", re.IGNORECASE), "percent"),
    (re.compile(r"&"), " and "),
    (re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE), r"\1"),
    (re.compile(r"(?<=\d)(?=(?:km|cm|mm|kg|gb|mb|tb|ha|m|g)\b)", re.IGNORECASE), " "),
    (re.compile(r"'s\b|(?<=s)'(?=\s|$)"), ""),
    (re.compile(r"(?<=\w)[-–](?=\w)"), " "),
)
_DATE = re.compile(r"\b(\d{4})-(0[1-9]|1[0-2])-([0-3]\d)\b")
_TIME = re.compile(r"\b(\d{1,2})(?::(\d\d))?\s([ap])m\b|\b(\d{1,2}):(\d\d)\b", re.IGNORECASE)


class Token(NamedTuple):
    """One word or mark. `is_name` if it is written with a capital and no small word."""

    stem: str
    is_name: bool = False
    word: str = ""

    @property
    def is_mark(self) -> bool:
        return self.stem in _MARKS

    @property
    def is_number(self) -> bool:
        return self.stem[:1].isdigit() or self.stem[:2].lstrip("-")[:1].isdigit()

    @property
    def is_content(self) -> bool:
        """Whether it carries meaning."""
        return not self.is_mark and self.word not in SMALL_WORDS and self.stem not in SMALL_WORDS


def read(text: str) -> list[Token]:
    """The words and marks of a text, in order."""
    text = "".join(c for c in unicodedata.normalize("NFKD", clean(text)) if not unicodedata.combining(c))
    text = re.sub(r"([$€£])\s?(\d+(?:\.\d+)?)", lambda m: f"{m[2]} {_CURRENCIES[m[1]]}", text)
    text = _DATE.sub(lambda m: f"{int(m[3])} {MONTHS[int(m[2]) - 1]} {m[1]}", text)
    for pattern, written in _REWRITTEN:
        text = pattern.sub(written, text)
    text = _TIME.sub(_time, text)
    raw = _TOKEN.findall(text)
    tokens: list[Token] = []
    for one in _with_numbers(raw):
        word = one.casefold().strip("'.")
        is_name = one[:1].isupper() and word not in SMALL_WORDS | NO_NAMES
        behind_number = bool(tokens) and tokens[-1].is_number
        tokens.append(Token(_unit(word) if behind_number else stem(word), is_name, word))
    return tokens


def stem(word: str) -> str:
    """What plurals and tenses of a word have in common; numbers and addresses stay as they are."""
    if word[:1].isdigit() or word[:1] == "-":
        return _decimal(word)
    word = READ_AS.get(word, word)
    if len(word) <= 3 or not word.isalpha() or word in AUXILIARIES:
        return word
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "shes", "ches", "xes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    word = READ_AS.get(word, word)
    for ending, least in (("ing", 6), ("ed", 5)):
        if word.endswith(ending) and len(word) >= least:
            word = word[: -len(ending)]
            word = word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls" else word
            break
    word = word[:-1] if len(word) > 3 and word.endswith("e") else word
    return word[:-1] + "y" if word.endswith("i") else word


_PLAIN_VERBS = frozenset(map(stem, PLAIN_VERBS))


def is_verb(token: Token) -> bool:
    """Whether a word is one of the verbs that join a subject to what is said of it."""
    if token.is_name or token.word.endswith("ing"):
        return False
    return token.word in AUXILIARIES or is_plain(token)


def is_plain(token: Token) -> bool:
    """Whether a word, a verb or made of one, carries nothing itself: `taking` in `Taking photographs`."""
    return token.stem in _PLAIN_VERBS


def same(one: str, other: str) -> bool:
    """Whether two stems are one: equal, or one an initial of the other."""
    return one == other or (min(len(one), len(other)) == 1 and one[0] == other[0] and one.isalpha() and other.isalpha())


def kin(one: str, other: str) -> bool:
    """Whether two stems are of one family: `mexic(o)`, `mexican`; `month`, `monthly`."""
    if one == other:
        return True
    if any(len(root) >= 4 and b.startswith(root) for a, b in ((one, other), (other, one)) for root in _roots(a)):
        return True
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return shared >= 4 and shared >= min(len(one), len(other)) - 1 and not any(map(str.isdigit, one + other))


def _roots(word: str) -> list[str]:
    """A word without the ending of a people: `swed` of `swedish`."""
    return [word.removesuffix(ending) for ending in ("ish", "ian", "ese") if word.endswith(ending)]


def _unit(word: str) -> str:
    return stem(UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word)


def _decimal(word: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?", word) or re.match(r"-?0\d", word):
        return word
    return f"{Decimal(word).normalize():f}"


def _time(match: re.Match[str]) -> str:
    """A time of day as `h18:05`; without am and pm as it stands."""
    if match[3] is None:
        return f"h{int(match[4])}:{match[5]}"
    hour = int(match[1]) % 12 + (12 if match[3].lower() == "p" else 0)
    return f"h{hour}:{match[2] or '00'}"


def _with_numbers(raw: list[str]) -> list[str]:
    """The same with numbers in digits: `two hundred and five` is `205`."""
    found: list[str] = []
    place = 0
    while place < len(raw):
        number, length = _number(raw, place)
        found.append(raw[place] if number is None else str(number))
        place += max(1, length)
    return found


def _number(raw: list[str], start: int) -> tuple[int | None, int]:
    """The number that begins at `start` in words, and how many words it has; None and 0 if none does."""
    total = current = 0
    place = end = start
    room = 1000
    while place < len(raw):
        word = raw[place].casefold()
        value = NUMBERS.get(word)
        if value is not None and (value < room or place == start):
            current += value
            room = 10 if value >= 20 else 1
        elif word == "hundred" and 0 < current < 10:
            current, room = current * 100, 100
        elif word == "thousand" and 0 < current < 1000:
            total, current, room = total + current * 1000, 0, 1000
        elif word == "and" and place > start and raw[place - 1].casefold() in ("hundred", "thousand"):
            place += 1
            continue
        else:
            break
        place += 1
        end = place
    return (total + current, end - start) if end > start else (None, 0)
