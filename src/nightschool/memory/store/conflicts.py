"""Entries that may contradict each other, and what people decide about them.

Two values of a single-valued relation contradict each other for certain. Of sentences whose subject and relation cannot be told
the close ones are shown, for people to decide: likeness never ends an entry.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
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
# Pairs that are compared, those with the rarest words first: a second of work.
_MOST_COMPARED = 500_000
_SHARED = "(SELECT address FROM addresses WHERE address >= 0 GROUP BY address HAVING count(*) > 1)"
_SEVERAL = (
    f"SELECT subject_key, relation_key FROM {at_addresses(f'address IN {_SHARED}')} "  # noqa: S608
    "WHERE died IS NULL AND subject_key IS NOT NULL "
    "GROUP BY subject_key, relation_key HAVING count(*) > 1 ORDER BY min(row)"
)
MOST_TOLD = 10_000
_SENTENCES = (
    f"SELECT row, CAST(text AS BLOB) FROM {at_addresses('address BETWEEN :first AND :last')} "  # noqa: S608
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
    """Pairs of rows.

    Of two sets of words that are that close, the rarest words of each, all but `CLOSE` of them, have one in common (prefix filtering;
    Chaudhuri et al. 2006), so that not all sentences need to be compared with all.
    """
    counts = Counter(word for _, own in _sentences(connection) for word in own)
    rows_with: dict[str, list[int]] = {}
    for row, own in _sentences(connection):
        rarest = sorted(own, key=lambda word: (counts[word], word))
        for word in rarest[: len(own) - math.ceil(CLOSE * len(own) - 1e-9) + 1]:
            rows_with.setdefault(word, []).append(row)
    met: set[tuple[int, int]] = set()
    for word in sorted(rows_with, key=lambda word: (counts[word], word)):
        met.update(islice(combinations(rows_with[word], 2), _MOST_COMPARED - len(met)))
    wanted = sorted({row for pair in met for row in pair})
    words = {row: _words(entry.text) for row, entry in rows.by_numbers(connection, wanted).items()}
    return sorted(pair for pair in met if _likeness(words[pair[0]], words[pair[1]]) >= CLOSE)


def _sentences(connection: sqlite3.Connection) -> Iterator[tuple[int, set[str]]]:
    """The row and the words of each living sentence, one at a time."""
    values = {"first": SENTENCES[0], "last": SENTENCES[1], "until": EVERY_ROW}
    for row, text in connection.execute(_SENTENCES, values):
        yield row, _words(text.decode(errors="replace"))


def _words(text: str) -> set[str]:
    return {word for word in map(key_of, text.split()) if word}


def _likeness(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def _as_rival(one: MemoryEntry) -> Rival:
    return Rival(one.row, one.entry, one.text, one.value, micros_of(one.valid_from), micros_of(one.valid_to))
