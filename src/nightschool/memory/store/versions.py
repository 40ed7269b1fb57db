"""Going back, and comparing: rollback, undo, named versions, the difference between two revisions.

All take time by what changed between the revisions, not by what the memory holds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.memory.entry import MemoryEntry, micros_of, moment_of
from nightschool.memory.store import rows
from nightschool.memory.store.layout import CONTENT_COLUMNS, digest_of
from nightschool.memory.store.writing import Write
from nightschool.store.names import check_name

UNDO, PURGE = "undo", "purge"
_SAME = " AND ".join(f"now.{one} IS old.{one}" for one in CONTENT_COLUMNS)
_COPIED = ", ".join(CONTENT_COLUMNS)
_RETURNING = (
    f"INSERT INTO coming SELECT old.row, now.row, {_SAME} "  # noqa: S608
    "FROM rows old LEFT JOIN rows now ON now.entry = old.entry AND now.row > now.entry AND now.row > :last AND now.died IS NULL "
    "WHERE old.died > :at AND old.row <= :last"
)
_ENDING = "row > :last AND died IS NULL AND row NOT IN (SELECT now FROM coming WHERE stays AND now IS NOT NULL)"
_COUNT_ENDING = f"SELECT count(*), coalesce(sum(row), 0) FROM rows WHERE {_ENDING}"  # noqa: S608
_COUNT_COMING = "SELECT count(now), count(*) - count(now) FROM coming WHERE NOT stays"
_END = f"UPDATE rows SET died = :revision WHERE {_ENDING}"  # noqa: S608
_COPY = (
    f"INSERT INTO rows (row, {_COPIED}, born, replaces, text_key, digest) "  # noqa: S608
    f"SELECT :from + row_number() OVER (ORDER BY old), {_COPIED}, :revision, now, text_key, digest "
    "FROM coming JOIN rows ON row = old WHERE NOT stays ORDER BY old"
)
_IN_NEWER = (
    "SELECT {columns} FROM rows WHERE row > :last AND row <= :end AND (died IS NULL OR died > :newer) ORDER BY row"
)
_ENDED_BETWEEN = "SELECT {columns} FROM rows WHERE died > :older AND died <= :newer AND row <= :last ORDER BY row"


@dataclass(frozen=True)
class NamedVersion:
    """A name for a revision."""

    name: str
    revision: int
    at: datetime
    author: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "revision": self.revision, "at": self.at.isoformat(), "author": self.author}


@dataclass(frozen=True)
class Difference:
    """An entry that two revisions have differently; None where one of them does not have it."""

    before: MemoryEntry | None
    after: MemoryEntry | None

    @property
    def id(self) -> str:
        entry = self.before or self.after
        assert entry is not None
        return entry.id

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"

    def to_json(self) -> dict[str, Any]:
        sides = {"before": self.before, "after": self.after}
        shown = {side: None if entry is None else entry.to_json() for side, entry in sides.items()}
        return {"id": self.id, "kind": self.kind, **shown}


def roll_back(write: Write, target: int) -> None:
    """End what was born after `target`, and write again what ended after it, as a new revision. Purged rows do not return.

    What says the same again already stays as it is. SQLite does it all, so that bringing back a million rows takes no more memory
    than a thousand; a row that comes back keeps its digest.
    """
    connection = write.connection
    values = {"at": target, "last": rows.last_row(connection, target), "revision": write.revision}
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS coming (old INTEGER PRIMARY KEY, now INTEGER, stays INTEGER)")
    connection.execute("DELETE FROM coming")
    connection.execute(_RETURNING, values)
    num_ended, sum_ended = connection.execute(_COUNT_ENDING, values).fetchone()
    write.count_ended(num_ended, sum_ended)
    write.superseded, write.added = connection.execute(_COUNT_COMING).fetchone()
    write.removed = num_ended - write.superseded
    connection.execute(_END, values)
    write.count_copied(connection.execute(_COPY, values | {"from": write.last_row}).rowcount)
    connection.execute("DELETE FROM coming")


def target_of_undo(connection: sqlite3.Connection) -> int:
    """The revision whose state an undo brings back: that before the newest write which was not undone yet.

    Raises:
        Conflict: If there is none, or it was a purge.
    """
    query = "SELECT operation, restores FROM revisions WHERE revision = ?"
    at = rows.newest_revision(connection)
    while True:
        operation, restores = connection.execute(query, (at,)).fetchone()
        if operation != UNDO:
            break
        at = int(restores)
    if at == 0:
        raise Conflict("There is nothing to undo: this is the state in which the memory was made.")
    if operation == PURGE:
        raise Conflict(
            f"Revision {at} purged entries, which cannot be undone. To go back to what was before it, but for these, "
            f"roll back to revision {at - 1}."
        )
    return at - 1


def check_version_name(name: str) -> str:
    """Return a name for a version, if it can be told from the number of a revision.

    Raises:
        NameRefused: Otherwise.
    """
    check_name(name, what="version")
    if name.isdigit():
        raise NameRefused(f"The version {name!r} is refused, because it reads like a revision. Choose a word.")
    return name


def name_version(connection: sqlite3.Connection, version: NamedVersion) -> None:
    """Raises Conflict if the name is taken."""
    taken = connection.execute("SELECT revision FROM versions WHERE name = ?", (version.name,)).fetchone()
    if taken is not None:
        raise Conflict(
            f"The version {version.name!r} is revision {taken[0]} already. Choose another name, or remove it."
        )
    kept = (version.name, version.revision, micros_of(version.at), version.author)
    connection.execute("INSERT INTO versions VALUES (?,?,?,?,?)", (*kept, digest_of(kept)))


def remove_version(connection: sqlite3.Connection, name: str) -> None:
    """Raises NotFound if there is no such version."""
    if not connection.execute("DELETE FROM versions WHERE name = ?", (name,)).rowcount:
        raise NotFound(_no_version(connection, name))


def versions_of(connection: sqlite3.Connection) -> list[NamedVersion]:
    """All named versions, oldest revision first."""
    found = connection.execute("SELECT name, revision, at, author FROM versions ORDER BY revision, name")
    return [NamedVersion(name, revision, _moment(at), author) for name, revision, at, author in found]


def revision_at(connection: sqlite3.Connection, at: int | str | None) -> int:
    """The revision that is meant: the newest, one by its number, or one by its name.

    Raises:
        NotFound: If there is none.
    """
    newest = rows.newest_revision(connection)
    if at is None:
        return newest
    if isinstance(at, str) and not at.isdecimal():
        found = connection.execute("SELECT revision FROM versions WHERE name = ?", (at,)).fetchone()
        if found is None:
            raise NotFound(_no_version(connection, at))
        return int(found[0])
    revision = int(at)
    if not 0 <= revision <= newest:
        raise NotFound(f"There is no revision {revision}. The revisions of this memory are 0 to {newest}.")
    return revision


def difference(connection: sqlite3.Connection, before: int, after: int) -> Iterator[Difference]:
    """The entries that two revisions have differently, by their rows; what came back as it was is no difference."""
    older, newer = sorted((before, after))
    last, end = rows.last_row(connection, older), rows.last_row(connection, newer)
    in_newer = {
        one.entry: one for one in rows.found_by(connection, _IN_NEWER, {"last": last, "end": end, "newer": newer})
    }
    values = {"older": older, "newer": newer, "last": last}
    in_older = {one.entry: one for one in rows.found_by(connection, _ENDED_BETWEEN, values)}
    for entry in sorted(in_newer.keys() | in_older.keys()):
        old, new = in_older.get(entry), in_newer.get(entry)
        if old is None or not _says_it_still(new, old):
            yield Difference(old, new) if before <= after else Difference(new, old)


def _says_it_still(now: MemoryEntry | None, then: MemoryEntry) -> bool:
    return now is not None and _content(now) == _content(then)


def _content(entry: MemoryEntry) -> tuple[object, ...]:
    return (
        entry.text, entry.wording, entry.subject, entry.relation, entry.value, entry.source, entry.author, entry.valid_from,
        entry.valid_to, entry.recorded_at,
    )  # fmt: skip


def _no_version(connection: sqlite3.Connection, name: str) -> str:
    known = ", ".join(version.name for version in versions_of(connection)) or "none yet"
    return f"There is no version {name[:80]!r} of this memory. Its versions: {known}."


def _moment(micros: int) -> datetime:
    moment = moment_of(micros)
    assert moment is not None
    return moment
