"""Searching by words: entries that hold the words of a query, those with most of them first."""

from __future__ import annotations

import sqlite3

from nightschool.memory.entry import MemoryEntry
from nightschool.memory.facts import key_of
from nightschool.memory.store import rows

_MOST_WORDS = 16


def by_words(connection: sqlite3.Connection, query: str, at: int, limit: int) -> list[MemoryEntry]:
    """The entries of a revision that hold words of the query, or begin words with them; most of them first, then newest first.

    It reads all entries, whatever they say, and so needs no index that a purge could forget: 4 s where there are a million.
    """
    words = _words_of(query)
    if not words:
        return []
    # A space before the text lets the first word begin like every other.
    tests = " + ".join(f"(' ' || text LIKE :word{place} ESCAPE '\\')" for place in range(len(words)))
    values: dict[str, object] = {f"word{place}": f"% {_escaped(word)}%" for place, word in enumerate(words)}
    found = f"SELECT {{columns}}, {tests} AS score FROM rows WHERE {rows.ALIVE_AT} AND score > 0 "  # noqa: S608
    order = "ORDER BY score DESC, row DESC LIMIT :limit"
    return list(rows.found_by(connection, found + order, values | {"at": at, "limit": limit}))


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def share_of_words(text: str, query: str) -> float:
    """How many of a query's words `by_words` finds in a text, of all that it looks for; 0…1."""
    words = _words_of(query)
    # SQLite's LIKE takes capitals of ASCII alone for small letters.
    there = " " + "".join(sign.lower() if sign.isascii() else sign for sign in text)
    return sum(f" {word}" in there for word in words) / len(words) if words else 0.0


def _words_of(query: str) -> list[str]:
    return [word for word in dict.fromkeys(map(key_of, query.split())) if word][:_MOST_WORDS]
