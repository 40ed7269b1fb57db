"""Purging: nothing of an entry stays in the file, in no revision, and in no log beside it.

Rows are deleted with all their versions, then the file is written anew (`VACUUM`) and its log emptied, so that nothing depends on
what SQLite leaves in pages that it has rearranged. (It overwrites what it deletes; in twenty files nothing was left.) A purge that
was cut off before that is noted in the file, and goes on when it is called again. The index holds tokens of what was purged: it
is dropped, and whoever asks the memory next makes it anew.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.errors import Locked, NotFound
from nightschool.memory.entry import entry_id, entry_number
from nightschool.memory.store import rows
from nightschool.memory.store.connection import Connections
from nightschool.memory.store.layout import digest_of
from nightschool.memory.store.versions import versions_of
from nightschool.memory.store.writing import Write
from nightschool.store.atomic import remove_folder

INDEX_FOLDER = "index"
"""Below the memory's folder: where its index lies."""
_WAIT_SECONDS = 10
_ADDRESS = "address_of(subject_key, relation_key, text_key)"
_DELETE = (
    f"DELETE FROM addresses WHERE entry = :entry AND address IN (SELECT {_ADDRESS} FROM rows WHERE {rows.OF_ENTRY})",  # noqa: S608
    f"DELETE FROM rows WHERE {rows.OF_ENTRY}",  # noqa: S608
)
_DELETE_DAMAGED = ("DELETE FROM addresses WHERE entry = :entry", _DELETE[1])


@dataclass(frozen=True)
class Purge:
    """What was purged: entries, how many rows they had, which named versions had shown them, and whether an index was dropped."""

    revision: int
    entries: tuple[str, ...]
    num_rows: int
    versions: tuple[str, ...]
    index_dropped: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "entries": list(self.entries),
            "rows": self.num_rows,
            "versions": list(self.versions),
            "index_dropped": self.index_dropped,
        }


def delete_rows(write: Write, entries: Sequence[str]) -> Purge:
    """Delete all rows of entries, whether they ended or not, and note their numbers.

    Raises:
        NotFound: If one of them is not there at all.
    """
    connection, shown, num_rows = write.connection, set[str](), 0
    versions = versions_of(connection)
    for number in map(entry_number, entries):
        past = rows.history_of(connection, number)
        if not past:
            raise NotFound(rows.not_there(connection, number, write.revision - 1))
        for one in past:
            died = write.revision if one.died is None else one.died
            if one.died is None:
                write.count_ended(1, one.row)
            kept = (one.row, one.entry, one.born, died, write.revision)
            connection.execute("INSERT INTO purged VALUES (?,?,?,?,?,?)", (*kept, digest_of(kept)))
            connection.execute("DELETE FROM settled WHERE row_a = :row OR row_b = :row", {"row": one.row})
            shown |= {version.name for version in versions if one.is_in(version.revision)}
        # Keys that are not what was written do not lead to the addresses that were made of them.
        statements = _DELETE_DAMAGED if any(one.damaged for one in past) else _DELETE
        for statement in statements:
            connection.execute(statement, {"entry": number})
        write.numbers.append(number)
        num_rows += len(past)
    connection.execute("UPDATE about SET purge_pending = 1")
    return Purge(write.revision, tuple(map(entry_id, write.numbers)), num_rows, tuple(sorted(shown)))


def is_pending(connection: sqlite3.Connection) -> bool:
    """Whether a purge was cut off before the file was written anew."""
    return bool(connection.execute("SELECT purge_pending FROM about").fetchone()[0])


def drop_index(folder: Path) -> bool:
    """Remove all that was derived from a memory's entries. Returns whether there was anything."""
    index = folder / INDEX_FOLDER
    if not index.is_dir():
        return False
    remove_folder(index)
    return True


def write_anew(connections: Connections) -> None:
    """Write the file anew without what was deleted, and empty its log.

    Raises:
        Locked: If somebody reads or writes for so long that it cannot be finished; what was deleted is in no revision, but
            its bytes may still be in the file.
    """
    with connections.alone() as connection:
        connection.execute("VACUUM")
        # After it the pages of before are still in the log, and the flag is still up.
        _empty_log(connection, connections)
        connection.execute("UPDATE about SET purge_pending = 0")


def _empty_log(connection: sqlite3.Connection, connections: Connections) -> None:
    before = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.execute(f"PRAGMA busy_timeout = {_WAIT_SECONDS * 1000}")
    try:
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        connection.execute(f"PRAGMA busy_timeout = {before}")
    if busy:
        raise Locked(
            f"What was purged is in no revision any more, but another process reads {connections.file}, so its bytes are "
            f"still in the log. Purge again when that process has ended."
        )
