"""Quantities that carry their unit: seconds, bytes, tokens, steps, shares, and "every so often".

Written by people as `10m`, `24h`, `16k tokens`, `500 steps`, `2 epochs`, `1.5 GB`, `5%`. Parsed once, here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

_NUMBER = r"(?P<number>\d+(?:\.\d+)?)"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_MULTIPLIERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_seconds(value: str | float) -> float:
    """Seconds from `90`, `90s`, `10m`, `24h`, `7d`; a bare number is seconds.

    Raises:
        ValueError: If the text is not a duration, or is negative.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is negative; a duration is at least 0 s")
        return float(value)
    match = re.fullmatch(rf"{_NUMBER}\s*(?P<unit>[a-z]*)", str(value).strip().lower())
    if match is None or (match["unit"] or "s") not in _SECONDS:
        raise ValueError(f"{value!r} is not a duration; write for example 90s, 10m, 24h or 7d")
    return float(match["number"]) * _SECONDS[match["unit"] or "s"]


def parse_tokens(value: str | int) -> int:
    """Tokens from `2048`, `16k`, `16k tokens`, `1.5M tokens`.

    Raises:
        ValueError: If the text is not a count of tokens, or is not a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is negative; a count of tokens is at least 0")
        return value
    match = re.fullmatch(rf"{_NUMBER}\s*(?P<mult>[kmb]?)\s*(?:tokens?)?", str(value).strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is not a count of tokens; write for example 2048 or 16k tokens")
    tokens = float(match["number"]) * _MULTIPLIERS[match["mult"]]
    if tokens != int(tokens):
        raise ValueError(f"{value!r} is not a whole number of tokens")
    return int(tokens)


def parse_bytes(value: str | int) -> int:
    """Bytes from `20000000`, `20 MB`, `1.5 GB`, `512 kB`; decimal units, as disks and networks count.

    Raises:
        ValueError: If the text is not a count of bytes, or it is less than 1.
    """
    match = re.fullmatch(rf"{_NUMBER}\s*(?P<unit>[kmgt]?)(?:b(?:/s)?)?", str(value).strip().lower())
    if isinstance(value, bool) or match is None:
        raise ValueError(f"{value!r} is not a count of bytes; write for example 20 MB or 1.5 GB")
    count = int(Decimal(match["number"]) * _BYTES[match["unit"]])
    if count < 1:
        raise ValueError(f"{value!r} is less than one byte; write for example 20 MB or 1.5 GB")
    return count


def parse_share(value: str | float) -> float:
    """A share between 0 and 1 from `0.05` or `5%`.

    Raises:
        ValueError: If the text is not a share, or lies outside 0…1.
    """
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{value!r} is not a share; write for example 5% or 0.05") from None
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} lies outside 0…100 %; write for example 5% or 0.05")
    return share


@dataclass(frozen=True)
class Every:
    """How often something happens: every `amount` steps, epochs or seconds."""

    amount: float
    unit: Literal["steps", "epochs", "seconds"]

    @classmethod
    def parse(cls, value: str | float | Every) -> Every:
        """`500 steps`, `2 epochs`, `10m`; a bare number is steps.

        Raises:
            ValueError: If the text is no such rhythm, or the amount is not above 0.
        """
        if isinstance(value, Every):
            return value
        # YAML reads 1e3 as a float; as text it would look like 1000 seconds.
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
        match = re.fullmatch(r"(?P<number>\d+)\s*(?P<unit>steps?|epochs?|)", text)
        if match is not None:
            unit: Literal["steps", "epochs"] = "epochs" if match["unit"].startswith("epoch") else "steps"
            every = cls(int(match["number"]), unit)
        else:
            try:
                if isinstance(value, float):
                    raise ValueError
                every = cls(parse_seconds(text), "seconds")
            except ValueError:
                raise ValueError(f"{value!r} is not a rhythm; write for example 500 steps, 2 epochs or 10m") from None
        if every.amount <= 0:
            raise ValueError(f"{value!r} would never end; the amount is above 0")
        return every

    def __str__(self) -> str:
        return format_seconds(self.amount) if self.unit == "seconds" else f"{_digits(self.amount)} {self.unit}"


def format_seconds(seconds: float) -> str:
    """The shortest exact spelling that `parse_seconds` reads back: `24h`, `90s`."""
    for unit in ("d", "h", "m"):
        size = _SECONDS[unit]
        # Everybody says 24h.
        if seconds >= (2 * size if unit == "d" else size) and seconds % size == 0:
            return f"{_digits(seconds / size)}{unit}"
    return f"{_digits(seconds)}s"


def _digits(number: float) -> str:
    """Every digit and no exponent, so that what is printed reads back as the same number."""
    text = format(Decimal(repr(number)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_bytes(count: float) -> str:
    """`1.2 GB`: three significant digits, decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str, *, colours: bool = False) -> str:
    """Text for a terminal, in which control characters are written out as Python writes them, not obeyed.

    Models, data, templates and servers write what they like, and a terminal may take it for a command (OSC 52 fills the
    clipboard). Line ends and tabs stay; with `colours` so do sequences that only colour, as our own tables have them.
    """
    if colours:
        parts = _COLOURS.split(text)
        return "".join(part if index % 2 else printable(part) for index, part in enumerate(parts))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
