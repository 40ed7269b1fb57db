"""Rows as SQLite has them, read as entries."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from nightschool.memory.entry import MemoryEntry, moment_of
from nightschool.memory.store.layout import ROW_COLUMNS

ENTRY_COLUMNS = ", ".join((*ROW_COLUMNS, "died"))
ALIVE_AT = "born <= :at AND (died IS NULL OR died > :at)"
_VARIABLES = 500


def entry_of(found: Sequence[Any]) -> MemoryEntry:
    """The entry of a row with `ENTRY_COLUMNS`."""
    (row, entry, text, wording, subject, relation, value, subject_key, relation_key, source, author) = found[:11]
    valid_from, valid_to, recorded_at, born, replaces, died = found[11:]
    recorded = moment_of(recorded_at)
    assert recorded is not None
    return MemoryEntry(
        row, entry, text, wording, subject, relation, value, subject_key, relation_key, source, author,
        moment_of(valid_from), moment_of(valid_to), recorded, born, died, replaces,
    )  # fmt: skip


def by_numbers(connection: sqlite3.Connection, rows: Sequence[int]) -> dict[int, MemoryEntry]:
    """The entries of rows by their numbers; purged rows are not there."""
    found: dict[int, MemoryEntry] = {}
    for begin in range(0, len(rows), _VARIABLES):
        part = [int(row) for row in rows[begin : begin + _VARIABLES]]
        marks = ",".join("?" * len(part))
        query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE row IN ({marks})"  # noqa: S608
        found |= {one[0]: entry_of(one) for one in connection.execute(query, part)}
    return found


def last_row(connection: sqlite3.Connection, revision: int) -> int:
    """The newest row that a revision knows: rows are numbered in the order of their revisions."""
    query = "SELECT last_row FROM revisions WHERE revision <= ? ORDER BY revision DESC LIMIT 1"
    return int(connection.execute(query, (revision,)).fetchone()[0])


def alive_row(connection: sqlite3.Connection, entry: int, at: int) -> MemoryEntry | None:
    """An entry as a revision has it."""
    query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE entry = :entry AND {ALIVE_AT} ORDER BY row DESC LIMIT 1"  # noqa: S608
    found = connection.execute(query, {"entry": entry, "at": at}).fetchone()
    return None if found is None else entry_of(found)


def history_of(connection: sqlite3.Connection, entry: int) -> list[MemoryEntry]:
    """All rows of an entry, oldest first."""
    query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE entry = ? ORDER BY row"  # noqa: S608
    return [entry_of(one) for one in connection.execute(query, (entry,))]


def found_by(connection: sqlite3.Connection, query: str, values: dict[str, Any]) -> Iterator[MemoryEntry]:
    """The entries that a query over `rows` finds; `{columns}` in it stands for the columns of an entry."""
    for one in connection.execute(query.replace("{columns}", ENTRY_COLUMNS), values):
        yield entry_of(one)
