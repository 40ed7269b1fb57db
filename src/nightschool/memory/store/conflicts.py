"""Entries that may contradict each other, and what people decide about them.

Two values of a single-valued relation contradict each other for certain. Of sentences whose subject and relation cannot be told
the close ones are shown, for people to decide: likeness never ends an entry.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from nightschool.errors import UsageError
from nightschool.memory.entry import MemoryEntry, NewEntry, micros_of
from nightschool.memory.facts import key_of
from nightschool.memory.store import rows
from nightschool.memory.store.addresses import EVERY_ROW, SENTENCES, at_addresses
from nightschool.memory.store.relations import SINGLE, Relations
from nightschool.memory.store.writing import Rival, overlap

Decision = Literal["a", "b", "both", "merge"]
CLOSE = 0.6
"""Shared words ÷ all words, from which on two sentences are shown as close."""
_MOST_SHARING = 32
_SHARED = "(SELECT address FROM addresses WHERE address >= 0 GROUP BY address HAVING count(*) > 1)"
_SEVERAL = (
    f"SELECT subject_key, relation_key FROM {at_addresses(f'address IN {_SHARED}')} "  # noqa: S608
    "WHERE died IS NULL AND subject_key IS NOT NULL "
    "GROUP BY subject_key, relation_key HAVING count(*) > 1 ORDER BY min(row)"
)
MOST_TOLD = 10_000
_SENTENCES = (
    f"SELECT row, text FROM {at_addresses('address BETWEEN :first AND :last')} "  # noqa: S608
    "WHERE died IS NULL AND text_key IS NOT NULL ORDER BY row"
)


@dataclass(frozen=True)
class Contradiction:
    """Two entries of which perhaps only one holds. `kind`: two values of one relation, or two close sentences."""

    kind: Literal["values", "sentences"]
    a: MemoryEntry
    b: MemoryEntry

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "a": self.a.to_json(), "b": self.b.to_json()}


def contradictions(connection: sqlite3.Connection) -> Iterator[Contradiction]:
    """All pairs that nobody has settled: values first, each kind by the entries' rows."""
    settled = set(connection.execute("SELECT row_a, row_b FROM settled").fetchall())
    relations, newest = Relations(connection), rows.newest_revision(connection)
    for subject, relation in connection.execute(_SEVERAL, {"until": EVERY_ROW}).fetchall():
        if relations.of(relation) == SINGLE:
            found = rows.about(connection, subject, relation, newest)
            for a, b in combinations(found, 2):
                if (a.row, b.row) not in settled and overlap(_as_rival(a), _as_rival(b)):
                    yield Contradiction("values", a, b)
    for pair in _close_sentences(connection):
        if pair not in settled:
            found_by_row = rows.by_numbers(connection, pair)
            a, b = found_by_row[pair[0]], found_by_row[pair[1]]
            if overlap(_as_rival(a), _as_rival(b)):
                yield Contradiction("sentences", a, b)


def settle(connection: sqlite3.Connection, a: MemoryEntry, b: MemoryEntry) -> None:
    """Note that two entries as they are stand side by side."""
    connection.execute("INSERT OR IGNORE INTO settled VALUES (?, ?)", tuple(sorted((a.row, b.row))))


def merged(a: MemoryEntry, b: MemoryEntry) -> NewEntry:
    """One statement for two: both values, or both sentences, and both sources.

    Raises:
        UsageError: If one of them is damaged.
    """
    for one in (a, b):
        if one.damaged:
            raise UsageError(f"{one.damage} Give the text of the merged entry, or keep the other one.")
    source = " ".join(dict.fromkeys(one.source for one in (a, b) if one.source))
    if a.subject_key is not None and (a.subject_key, a.relation_key) == (b.subject_key, b.relation_key):
        return NewEntry("", a.subject, a.relation, f"{a.value} and {b.value}", source)
    return NewEntry(f"{a.text} {b.text}", source=source)


def _close_sentences(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    """Pairs of rows. Sentences meet at the words that few others have, so that not all need to be compared with all."""
    rows_with: dict[str, list[int]] = {}
    for row, text in rows.fetched(
        connection, _SENTENCES, {"first": SENTENCES[0], "last": SENTENCES[1], "until": EVERY_ROW}
    ):
        for word in _words(text):
            sharing = rows_with.setdefault(word, [])
            if len(sharing) <= _MOST_SHARING:
                sharing.append(row)
    pairs = {
        pair for sharing in rows_with.values() if 1 < len(sharing) <= _MOST_SHARING for pair in combinations(sharing, 2)
    }
    texts: dict[int, set[str]] = {}
    wanted = sorted({row for pair in pairs for row in pair})
    for row, entry in rows.by_numbers(connection, wanted).items():
        texts[row] = _words(entry.text)
    return sorted(pair for pair in pairs if _likeness(texts[pair[0]], texts[pair[1]]) >= CLOSE)


def _words(text: str) -> set[str]:
    return {word for word in map(key_of, text.split()) if word}


def _likeness(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def _as_rival(one: MemoryEntry) -> Rival:
    return Rival(one.row, one.entry, one.text, one.value, micros_of(one.valid_from), micros_of(one.valid_to))
