"""The store of an explicit memory: one SQLite file that holds every version of every entry.

    with MemoryStore.open(memory_path(home, "facts")) as store:
        store.add([NewEntry("Ada lives in Oslo.", source="chat_88")], author="ada")
        store.entries(at=store.revision)

What supersedes what is decided by the normalised subject and relation alone (`writing.py`), never by likeness.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from nightschool.errors import DataError, NotFound, UsageError
from nightschool.events import now
from nightschool.memory.entry import (
    Change,
    MemoryEntry,
    NewEntry,
    Revision,
    RowChange,
    entry_id,
    entry_number,
    micros_of,
    moment_of,
)
from nightschool.memory.facts import Fact, as_fact
from nightschool.memory.store import rows
from nightschool.memory.store.connection import FILE_NAME, Connections, create
from nightschool.memory.store.layout import TABLES, digest_of
from nightschool.memory.store.relations import Relations
from nightschool.memory.store.writing import Write
from nightschool.store.atomic import make_folder

_PAGE = 1000


class MemoryStore:
    """A memory's entries, with all their versions. For all threads of a process; several processes may write.

    Reading takes `at`, a revision; without it the newest one is read. Every use raises:
        NotFound: If the file is gone, or the revision or the entry does not exist.
        Locked: If another process has been writing for more than 30 s.
        DiskFull, Damaged, Conflict, MadeByNewer: As SQLite finds the file.
    """

    def __init__(self, folder: Path, *, busy_seconds: float = 30.0) -> None:
        self.folder = folder
        self._connections = Connections(folder / FILE_NAME, busy_seconds=busy_seconds)

    @classmethod
    def create(cls, folder: Path, *, busy_seconds: float = 30.0) -> MemoryStore:
        """Make an empty memory. Raises Conflict if there is one."""
        make_folder(folder)
        create(folder / FILE_NAME, TABLES + _first_rows(), busy_seconds)
        return cls.open(folder, busy_seconds=busy_seconds)

    @classmethod
    def open(cls, folder: Path, *, busy_seconds: float = 30.0) -> MemoryStore:
        """Open a memory. Raises NotFound if there is none."""
        store = cls(folder, busy_seconds=busy_seconds)
        _ = store.revision
        return store

    @property
    def identity(self) -> str:
        """Made at random when the memory was made: another memory of the same name has another."""
        with self._connections.reading() as connection:
            return str(connection.execute("SELECT identity FROM about").fetchone()[0])

    @property
    def revision(self) -> int:
        """The newest revision. 0 is the empty memory."""
        with self._connections.reading() as connection:
            return int(connection.execute("SELECT max(revision) FROM revisions").fetchone()[0])

    # --- reading

    def get(self, entry: str, *, at: int | None = None) -> MemoryEntry:
        """An entry as a revision has it. Raises NotFound if it is not there, or is no more."""
        number, revision = entry_number(entry), self._at(at)
        with self._connections.reading() as connection:
            found = rows.alive_row(connection, number, revision)
            past = rows.history_of(connection, number) if found is None else []
        if found is None:
            raise NotFound(_not_there(entry, past, revision))
        return found

    def rows(self, numbers: Sequence[int]) -> list[MemoryEntry | None]:
        """The entries of rows by their numbers, whenever they were; None for one that was purged."""
        with self._connections.reading() as connection:
            found = rows.by_numbers(connection, numbers)
        return [found.get(int(number)) for number in numbers]

    def entries(self, *, at: int | None = None, after: int = 0, limit: int | None = None) -> Iterator[MemoryEntry]:
        """The entries of a revision by their row numbers, beginning after the row `after`.

        Read a page at a time, so that writers and purges wait for nobody.
        """
        revision, left = self._at(at), limit
        while left is None or left > 0:
            page = min(_PAGE, _PAGE if left is None else left)
            query = f"SELECT {{columns}} FROM rows WHERE row > :after AND {rows.ALIVE_AT} ORDER BY row LIMIT :page"  # noqa: S608
            with self._connections.reading() as connection:
                found = list(rows.found_by(connection, query, {"after": after, "at": revision, "page": page}))
            yield from found
            if len(found) < page:
                return
            after, left = found[-1].row, None if left is None else left - page

    def count(self, *, at: int | None = None) -> int:
        """How many entries a revision has."""
        revision = self._at(at)
        with self._connections.reading() as connection:
            counted = "SELECT sum(born) - sum(ended) FROM revisions WHERE revision <= ?"
            gone = "SELECT count(*) FROM purged"
            total = int(connection.execute(counted, (revision,)).fetchone()[0])
            if not connection.execute(gone).fetchone()[0]:
                return total
            exact = f"SELECT count(*) FROM rows WHERE {rows.ALIVE_AT}"  # noqa: S608
            return int(connection.execute(exact, {"at": revision}).fetchone()[0])

    def history(self, entry: str) -> list[MemoryEntry]:
        """All rows of an entry, oldest first. Raises NotFound if there was never such an entry, or it was purged."""
        number = entry_number(entry)
        with self._connections.reading() as connection:
            found = rows.history_of(connection, number)
        if not found:
            raise NotFound(_not_there(entry, [], self.revision))
        return found

    def revisions(self, *, after: int = -1, limit: int | None = None) -> list[Revision]:
        """The committed writes after a revision, oldest first."""
        query = (
            "SELECT revision, at, author, operation, note, restores, born, ended FROM revisions WHERE revision > ? "
            "ORDER BY revision LIMIT ?"
        )
        with self._connections.reading() as connection:
            found = connection.execute(query, (after, -1 if limit is None else limit)).fetchall()
        return [_revision_of(one) for one in found]

    def changes_since(self, revision: int) -> Iterator[RowChange]:
        """What happened to rows after a revision, up to the newest, in order; within a revision births come first.

        A row that was purged since is told as purged alone.
        """
        newest = self.revision
        streams = (self._births(revision, newest), self._deaths(revision, newest), self._purges(revision, newest))
        for _, _, _, change in heapq.merge(*streams, key=lambda one: one[:3]):
            yield change

    # --- writing

    def add(self, entries: Iterable[NewEntry], *, author: str, operation: str = "add") -> Change:
        """Remember facts, all or none, as one revision. What says the same as an entry that is there changes nothing.

        Raises:
            DataError: If one of them is no fact, with its number; nothing is stored then.
        """
        with self._connections.writing() as connection:
            write = Write(connection, author, operation, Relations(connection))
            for number, new in enumerate(entries, start=1):
                try:
                    write.add(as_fact(new))
                except DataError as error:
                    raise DataError(f"Fact {number}: {error} Nothing was stored.") from error
            return _change_of(write)

    def edit(self, entry: str, *, author: str, text: str | None = None, value: str | None = None,
             source: str | None = None, **period: Any) -> Change:  # fmt: skip
        """Let an entry say something else: another sentence, or another value of the same subject and relation.

        Args:
            entry: Its id.
            author: Who does it.
            text: The new sentence.
            value: The new value, in place of `text`.
            source: Where that comes from. Without it a new statement has none, and the same statement keeps its own.
            period: `valid_from` and `valid_to`, where they change.

        Raises:
            UsageError: If nothing is to change, or `value` is given for a sentence without subject and relation.
        """
        with self._connections.writing() as connection:
            old = self._alive(connection, entry)
            new = _edited(old, text, value, source, period)
            write = Write(connection, author, "edit", Relations(connection), note=entry)
            fact = as_fact(new)
            if _same(old, fact):
                write.unchanged += 1
                write.numbers.append(old.entry)
            else:
                write.edit(old, fact)
            return _change_of(write)

    def remove(self, *entries: str, author: str) -> Change:
        """End entries: they are no longer read, but stay in the history. All or none."""
        with self._connections.writing() as connection:
            olds = {one: self._alive(connection, one) for one in entries}
            write = Write(connection, author, "remove", Relations(connection), note=" ".join(olds))
            for old in olds.values():
                write.remove(old)
            return _change_of(write)

    def close(self) -> None:
        """Give back the connections; the next use makes new ones."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, at: int | None) -> int:
        newest = self.revision
        if at is None:
            return newest
        if not 0 <= at <= newest:
            raise NotFound(f"The memory {self.folder.name!r} has no revision {at}. Its revisions are 0 to {newest}.")
        return at

    def _alive(self, connection: Any, entry: str) -> MemoryEntry:
        number = entry_number(entry)
        newest = int(connection.execute("SELECT max(revision) FROM revisions").fetchone()[0])
        found = rows.alive_row(connection, number, newest)
        if found is None:
            raise NotFound(_not_there(entry, rows.history_of(connection, number), newest))
        return found

    def _births(self, revision: int, newest: int) -> Iterator[tuple[int, int, int, RowChange]]:
        with self._connections.reading() as connection:
            after, end = rows.last_row(connection, revision), rows.last_row(connection, newest)
        query = "SELECT {columns} FROM rows WHERE row > :after AND row <= :end ORDER BY row LIMIT :page"
        while True:
            with self._connections.reading() as connection:
                found = list(rows.found_by(connection, query, {"after": after, "end": end, "page": _PAGE}))
            for one in found:
                yield one.born, 0, one.row, RowChange(one.born, "born", one.row, one)
            if len(found) < _PAGE:
                return
            after = found[-1].row

    def _deaths(self, revision: int, newest: int) -> Iterator[tuple[int, int, int, RowChange]]:
        query = (
            "SELECT died, row FROM rows WHERE died IS NOT NULL AND (died, row) > (?, ?) AND died <= ? "
            "ORDER BY died, row LIMIT ?"
        )
        return self._pages(query, "died", 1, revision, newest)

    def _purges(self, revision: int, newest: int) -> Iterator[tuple[int, int, int, RowChange]]:
        query = "SELECT revision, row FROM purged WHERE (revision, row) > (?, ?) AND revision <= ? ORDER BY revision, row LIMIT ?"
        return self._pages(query, "purged", 2, revision, newest)

    def _pages(
        self, query: str, kind: Any, order: int, revision: int, newest: int
    ) -> Iterator[tuple[int, int, int, RowChange]]:
        after = (revision + 1, 0)
        while True:
            with self._connections.reading() as connection:
                found = connection.execute(query, (*after, newest, _PAGE)).fetchall()
            for at, row in found:
                yield at, order, row, RowChange(at, kind, row)
            if len(found) < _PAGE:
                return
            after = found[-1]


def _change_of(write: Write) -> Change:
    return Change(write.finish(), write.added, write.superseded, write.removed, write.unchanged, write.numbers)


def _revision_of(found: Sequence[Any]) -> Revision:
    number, at, author, operation, note, restores, born, ended = found
    moment = moment_of(at)
    assert moment is not None
    return Revision(number, moment, author, operation, note, restores, born, ended)


def _first_rows() -> str:
    """The rows of a memory in which nothing is yet."""
    moment = micros_of(now())
    digest = digest_of((0, moment, "", "create", "", None, 0, 0, 0)).hex()
    return (
        f"INSERT INTO about VALUES ('{secrets.token_hex(8)}', {moment});"  # noqa: S608  numbers and digits of ours
        f"INSERT INTO revisions VALUES (0, {moment}, '', 'create', '', NULL, 0, 0, 0, x'{digest}')"
    )


def _edited(
    old: MemoryEntry, text: str | None, value: str | None, source: str | None, period: dict[str, Any]
) -> NewEntry:
    if text is None and value is None and source is None and not period:
        raise UsageError(f"Nothing of {old.id} is to change. Give a new text, value, source or period.")
    if text is not None and value is not None:
        raise UsageError("Give a new text or a new value, not both: the text states the value.")
    if value is not None and old.subject is None:
        raise UsageError(f"{old.id} has no subject and relation whose value could change. Give its new text.")
    dates = {"valid_from": old.valid_from, "valid_to": old.valid_to} | period
    if text is not None:
        return NewEntry(text, source=source or "", **dates)
    if value is not None:
        return NewEntry("", old.subject, old.relation, value, source or "", **dates)
    kept = old.source if source is None else source
    if old.subject is None:
        return NewEntry(old.text, source=kept, **dates)
    return NewEntry(old.wording or "", old.subject, old.relation, old.value, kept, **dates)


def _same(old: MemoryEntry, fact: Fact) -> bool:
    kept = (old.text, old.subject, old.relation, old.value, micros_of(old.valid_from), micros_of(old.valid_to))
    new = (fact.text, fact.subject, fact.relation, fact.value, fact.valid_from, fact.valid_to)
    return kept == new and fact.source in ("", old.source)


def _not_there(entry: str, past: list[MemoryEntry], revision: int) -> str:
    if not past:
        return f"There is no entry {entry}. nightschool memory ls and search show those that are there."
    ended = max(one.died or 0 for one in past)
    if past[0].born > revision:
        return (
            f"{entry_id(past[0].entry)} is not there at revision {revision}: it was added at revision {past[0].born}."
        )
    return (
        f"{entry} is no longer there at revision {revision}; it ended at revision {ended}. nightschool memory history "
        f"shows what it said."
    )
