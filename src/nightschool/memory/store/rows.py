"""Rows as SQLite has them, read as entries."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nightschool.errors import NotFound
from nightschool.memory.entry import MemoryEntry, entry_id, entry_number, moment_of
from nightschool.memory.facts.normalise import key_of, relation_key_of
from nightschool.memory.facts.retractions import keys_that_retract
from nightschool.memory.store.addresses import address_of, at_addresses, newest_row, of_subject
from nightschool.memory.store.layout import CONTENT_COLUMNS, ROW_COLUMNS, digest_of

ENTRY_COLUMNS = ", ".join((*ROW_COLUMNS, "died", "text_key", "digest"))
ALIVE_AT = "born <= :at AND (died IS NULL OR died > :at)"
# The first row of an entry has its number, and only later ones are in the index of entries.
OF_ENTRY = "(row = :entry OR rows.entry = :entry AND row > rows.entry) AND rows.entry = :entry"
_ABOUT = f"SELECT {{columns}} FROM {at_addresses('address BETWEEN :first AND :last')} WHERE subject_key = :subject AND {ALIVE_AT}"  # noqa: S608
_RETRACTION = f"SELECT 1 FROM {at_addresses('address = :address')} WHERE text_key = :key AND {ALIVE_AT}"  # noqa: S608
_NUM_COLUMNS = len(ROW_COLUMNS) + 3
_CONTENT = slice(1, 1 + len(CONTENT_COLUMNS))
_VARIABLES = 500


def entry_of(found: Sequence[Any]) -> MemoryEntry:
    """The entry of a row with `ENTRY_COLUMNS`, marked as damaged if it is not what was written."""
    (row, entry, text, wording, subject, relation, value, subject_key, relation_key, source, author) = found[:11]
    valid_from, valid_to, recorded_at, born, replaces, died, text_key, digest = found[11:]
    recorded = moment_of(recorded_at)
    assert recorded is not None
    return MemoryEntry(
        row, entry, text, wording, subject, relation, value, subject_key, relation_key, source, author,
        moment_of(valid_from), moment_of(valid_to), recorded, born, died, replaces,
        damaged=digest != digest_of((*found[_CONTENT], text_key)),
    )  # fmt: skip


def fetched(connection: sqlite3.Connection, query: str, values: Any = ()) -> list[Any]:
    """What a query over `rows` finds. Where a flipped bit left bytes that are no UTF-8, the rest of the text is shown."""
    try:
        return connection.execute(query, values).fetchall()
    except (sqlite3.OperationalError, UnicodeDecodeError) as error:
        if "decode" not in str(error).casefold():
            raise
    connection.text_factory = _as_far_as_it_is_text
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.text_factory = str


def _as_far_as_it_is_text(content: bytes) -> str:
    return content.decode(errors="replace")


def by_numbers(connection: sqlite3.Connection, rows: Sequence[int]) -> dict[int, MemoryEntry]:
    """The entries of rows by their numbers; purged rows are not there."""
    found: dict[int, MemoryEntry] = {}
    for begin in range(0, len(rows), _VARIABLES):
        part = [int(row) for row in rows[begin : begin + _VARIABLES]]
        marks = ",".join("?" * len(part))
        query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE row IN ({marks})"  # noqa: S608
        found |= {one[0]: entry_of(one) for one in fetched(connection, query, part)}
    return found


def entries_from(connection: sqlite3.Connection, source: str) -> list[str]:
    """The entries of which any row has this source."""
    query = "SELECT DISTINCT entry FROM rows WHERE source = ? ORDER BY entry"
    return [entry_id(one[0]) for one in fetched(connection, query, (source,))]


def last_row(connection: sqlite3.Connection, revision: int) -> int:
    """The newest row that a revision knows: rows are numbered in the order of their revisions."""
    query = "SELECT last_row FROM revisions WHERE revision <= ? ORDER BY revision DESC LIMIT 1"
    return int(connection.execute(query, (revision,)).fetchone()[0])


def alive_row(connection: sqlite3.Connection, entry: int, at: int) -> MemoryEntry | None:
    """An entry as a revision has it."""
    query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE row = {newest_row(':entry')} AND entry = :entry AND {ALIVE_AT}"  # noqa: S608
    found = fetched(connection, query, {"entry": entry, "at": at, "until": last_row(connection, at)})
    return entry_of(found[0]) if found else None


def newest_revision(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT max(revision) FROM revisions").fetchone()[0])


def required(connection: sqlite3.Connection, entry: str, at: int | None = None) -> MemoryEntry:
    """An entry as a revision has it, the newest one unless it is given.

    Raises:
        NotFound: If it is not there, or is no more.
        UsageError: If it is no id.
    """
    number, revision = entry_number(entry), newest_revision(connection) if at is None else at
    found = alive_row(connection, number, revision)
    if found is None:
        raise NotFound(not_there(connection, number, revision))
    return found


def not_there(connection: sqlite3.Connection, entry: int, revision: int) -> str:
    """Why an entry is not found."""
    name, past = entry_id(entry), history_of(connection, entry)
    if is_purged(connection, entry):
        return f"{name} was purged: nothing of it is left but its number."
    if not past:
        return f"There is no entry {name}. nightschool memory ls and search show those that are there."
    if past[0].born > revision:
        return f"{name} is not there at revision {revision}: it was added at revision {past[0].born}."
    ended = max(one.died for one in past if one.died is not None and one.died <= revision)
    return (
        f"{name} is no longer there at revision {revision}; it ended at revision {ended}. nightschool memory history "
        f"shows what it said."
    )


def about(
    connection: sqlite3.Connection, subject: str, relation: str | None, at: int, limit: int | None = None
) -> list[MemoryEntry]:
    """The entries of a revision about a subject, by normalised forms; about all of its relations, or one; the first `limit` of them."""
    key, until = key_of(subject), last_row(connection, at)
    first, last = of_subject(key)
    values: dict[str, object] = {"first": first, "last": last, "subject": key, "at": at, "until": until}
    values["limit"] = -1 if limit is None else limit
    query = f"{_ABOUT} ORDER BY row LIMIT :limit"
    if relation is not None:
        values["relation"] = relation_key_of(relation)
        query = f"{_ABOUT} AND relation_key = :relation ORDER BY row LIMIT :limit"
    return list(found_by(connection, query, values))


def leading_to(connection: sqlite3.Connection, values: Iterable[str], at: int) -> list[MemoryEntry]:
    """The entries of a revision whose value is one of these, by normalised forms. It reads the values of all entries."""
    keys = {key_of(value) for value in values}
    query = f"SELECT row, CAST(value AS BLOB) FROM rows WHERE {ALIVE_AT} AND value IS NOT NULL ORDER BY row"  # noqa: S608
    found = connection.execute(query, {"at": at})
    numbers = [row for row, value in found if key_of(value.decode(errors="replace")) in keys]
    return list(by_numbers(connection, numbers).values())


def is_retracted(connection: sqlite3.Connection, entry: MemoryEntry, at: int) -> bool:
    """Whether a revision takes back what an entry, of whatever memory, says."""
    values = {"at": at, "until": last_row(connection, at)}
    keys = [{"address": address_of(None, None, key), "key": key} for key in keys_that_retract(entry)]
    return any(connection.execute(_RETRACTION, values | key).fetchone() is not None for key in keys)


def history_of(connection: sqlite3.Connection, entry: int) -> list[MemoryEntry]:
    """All rows of an entry, oldest first."""
    query = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE {OF_ENTRY} ORDER BY row"  # noqa: S608
    return [entry_of(one) for one in fetched(connection, query, {"entry": entry})]


def found_by(connection: sqlite3.Connection, query: str, values: dict[str, Any]) -> Iterator[MemoryEntry]:
    """The entries that a query over `rows` finds; `{columns}` in it stands for the columns of an entry."""
    for one in fetched(connection, query.replace("{columns}", ENTRY_COLUMNS), values):
        yield entry_of(one[:_NUM_COLUMNS])


def is_purged(connection: sqlite3.Connection, entry: int) -> bool:
    """Whether an entry was purged."""
    return connection.execute("SELECT 1 FROM purged WHERE entry = ?", (entry,)).fetchone() is not None


def count(connection: sqlite3.Connection, at: int) -> int:
    """How many entries a revision has, counted by what each revision wrote and ended."""
    totals = "SELECT sum(born) - sum(ended) FROM revisions WHERE revision <= ?"
    gone = "SELECT count(*) FROM purged WHERE born <= :at AND died > :at"
    total, purged = connection.execute(totals, (at,)).fetchone()[0], connection.execute(gone, {"at": at}).fetchone()[0]
    return int(total) - int(purged)
