"""`MemoryStore`: what is done with a memory's file."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Self

from nightschool.errors import Damaged, DataError, NotFound, UsageError
from nightschool.events import now
from nightschool.memory.entry import (
    Change,
    MemoryEntry,
    NewEntry,
    Revision,
    RowChange,
    entry_number,
    micros_of,
    moment_of,
)
from nightschool.memory.facts import as_fact, key_of
from nightschool.memory.facts.normalise import relation_key_of
from nightschool.memory.facts.retractions import is_retraction, retraction_of
from nightschool.memory.store import check, conflicts, purge, rows, versions
from nightschool.memory.store.changes import changes_between
from nightschool.memory.store.conflicts import Contradiction, Decision
from nightschool.memory.store.connection import FILE_NAME, Connections, create
from nightschool.memory.store.edits import KEEP, Keep, edited, is_unchanged
from nightschool.memory.store.layout import TABLES, digest_of
from nightschool.memory.store.purge import Purge
from nightschool.memory.store.relations import SINGLE, Cardinality, Relations, set_relation
from nightschool.memory.store.search import by_words
from nightschool.memory.store.versions import Difference, NamedVersion
from nightschool.memory.store.writing import Write
from nightschool.store.atomic import make_folder

_PAGE = 1000
_ALIVE = f"SELECT {{columns}} FROM rows WHERE row > :after AND {rows.ALIVE_AT} ORDER BY row LIMIT :page"  # noqa: S608
_REVISIONS = (
    "SELECT revision, at, author, operation, note, restores, born, ended FROM revisions WHERE revision > ? "
    "ORDER BY revision LIMIT ?"
)


class MemoryStore:
    """A memory's entries, with all their versions. For all threads of a process; several processes may write.

    What is read is compared with its checksum, and marked where it differs (`MemoryEntry.damaged`).
    Reading takes `at`, the number of a revision or the name of a version; without it the newest revision is read. Writing is
    durable when it returns, and all or nothing. Every use raises:
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
            return rows.newest_revision(connection)

    # --- entries

    def get(self, entry: str, *, at: int | str | None = None) -> MemoryEntry:
        """An entry as a revision has it. Raises NotFound if it is not there, or is no more."""
        with self._connections.reading() as connection:
            return rows.required(connection, entry, versions.revision_at(connection, at))

    def rows(self, numbers: Sequence[int]) -> list[MemoryEntry | None]:
        """The entries of rows by their numbers, whenever they were; None for one that was purged."""
        with self._connections.reading() as connection:
            found = rows.by_numbers(connection, numbers)
        return [found.get(int(number)) for number in numbers]

    def entries(
        self, *, at: int | str | None = None, after: int = 0, limit: int | None = None
    ) -> Iterator[MemoryEntry]:
        """The entries of a revision by their row numbers, beginning after the row `after`.

        Read a page at a time, so that writers and purges wait for nobody.
        """
        revision, left = self.revision_at(at), limit
        while left is None or left > 0:
            page = _PAGE if left is None else min(_PAGE, left)
            with self._connections.reading() as connection:
                found = list(rows.found_by(connection, _ALIVE, {"after": after, "at": revision, "page": page}))
            yield from found
            if len(found) < page:
                return
            after, left = found[-1].row, None if left is None else left - page

    def sound_entries(self, *, at: int | str | None = None) -> Iterator[MemoryEntry]:
        """The entries of a revision, for whoever makes a copy of them. Raises Damaged at one that is not what was written."""
        for entry in self.entries(at=at):
            if entry.damaged:
                raise Damaged(entry.damage)
            yield entry

    def count(self, *, at: int | str | None = None) -> int:
        """How many entries a revision has."""
        with self._connections.reading() as connection:
            return rows.count(connection, versions.revision_at(connection, at))

    def history(self, entry: str) -> list[MemoryEntry]:
        """All rows of an entry, oldest first. Raises NotFound if there was never such an entry, or it was purged."""
        number = entry_number(entry)
        with self._connections.reading() as connection:
            found = rows.history_of(connection, number)
            if not found:
                raise NotFound(rows.not_there(connection, number, rows.newest_revision(connection)))
        return found

    def about(
        self, subject: str, relation: str | None = None, *, at: int | str | None = None, limit: int | None = None
    ) -> list[MemoryEntry]:
        """The entries about a subject, or about one relation of it, oldest first; both in any spelling that is the same."""
        with self._connections.reading() as connection:
            return rows.about(connection, subject, relation, versions.revision_at(connection, at), limit)

    def leading_to(self, values: Iterable[str], *, at: int | str | None = None) -> list[MemoryEntry]:
        """The entries whose value is one of these, in any spelling that is the same. It reads the values of all entries."""
        with self._connections.reading() as connection:
            return rows.leading_to(connection, values, versions.revision_at(connection, at))

    def hides(self, entry: MemoryEntry, *, at: int | str | None = None) -> bool:
        """Whether this memory hides another one's entry that lies beneath it.

        It does if it takes the very statement back, or says something of that subject and relation, if these have one value at a time.
        """
        with self._connections.reading() as connection:
            revision = versions.revision_at(connection, at)
            if rows.is_retracted(connection, entry, revision):
                return True
            if entry.subject is None or entry.relation is None or entry.relation_key is None:
                return False
            if Relations(connection).of(entry.relation_key) != SINGLE:
                return False
            return bool(rows.about(connection, entry.subject, entry.relation, revision))

    def search(self, query: str, *, at: int | str | None = None, limit: int = 20) -> list[MemoryEntry]:
        """The entries that hold words of a query, those with most of them first. Likeness of meaning is the index's."""
        with self._connections.reading() as connection:
            return by_words(connection, query, versions.revision_at(connection, at), limit)

    def add(self, entries: Iterable[NewEntry], *, author: str, operation: str = "add") -> Change:
        """Remember facts as one revision. What says the same as an entry that is there changes nothing.

        Raises:
            DataError: If one of them is no fact, with its number; nothing is stored then.
        """
        with self._writing(operation, author) as write:
            for number, new in enumerate(entries, start=1):
                try:
                    write.add(as_fact(new))
                except DataError as error:
                    raise DataError(f"{new.where or f'Fact {number}'}: {error} Nothing was stored.") from error
            return _finished(write)

    def edit(
        self,
        entry: str,
        *,
        author: str,
        text: str | None = None,
        value: str | None = None,
        source: str | None = None,
        valid_from: datetime | Keep | None = KEEP,
        valid_to: datetime | Keep | None = KEEP,
    ) -> Change:
        """Let an entry say something else: another sentence, or another value of the same subject and relation.

        Without a `source` a new statement has none, and the same statement keeps its own.

        Raises:
            UsageError, DataError: If that makes no sense, or no fact.
        """
        with self._writing("edit", author, note=entry) as write:
            old = rows.required(write.connection, entry)
            changed = edited(old, text=text, value=value, source=source, valid_from=valid_from, valid_to=valid_to)
            fact = as_fact(changed)
            if is_unchanged(old, fact):
                write.leave(old.entry)
            else:
                write.edit(old, fact)
            return _finished(write)

    def remove(self, *entries: str, author: str) -> Change:
        """End entries: they are no longer read, but stay in the history."""
        with self._writing("remove", author, note=_named(entries)) as write:
            for old in {one: rows.required(write.connection, one) for one in entries}.values():
                write.remove(old)
            return _finished(write)

    def retract(self, *others: tuple[str, MemoryEntry], author: str) -> Change:
        """Take back what entries of other memories say: they stay as they are, and are hidden where this memory lies over them.

        What it writes are entries, whose sources are the names that are given with the others: they can be listed, ended and undone.

        Raises:
            UsageError: If one of them is itself a retraction, or damaged.
        """
        for name, entry in others:
            if entry.damaged:
                raise UsageError(f"{name} cannot be taken back as it is. {entry.damage}")
            if is_retraction(entry):
                raise UsageError(f"{name} only takes something back ({entry.text[:80]!r}). End it in its own memory.")
        with self._writing("retract", author, note=_named([name for name, _ in others])) as write:
            for name, entry in others:
                if entry.subject_key is not None and entry.relation_key is not None:
                    # The rules may read its statement otherwise than it was given.
                    write.take_back((entry.subject_key, entry.relation_key, key_of(entry.value or "")))
                write.add(as_fact(retraction_of(entry, name)))
            return _finished(write)

    def entries_from(self, source: str) -> list[str]:
        """The entries that said something from this source at any time, oldest first. It reads the sources of all rows."""
        with self._connections.reading() as connection:
            return rows.entries_from(connection, source)

    def set_apart(self, entries: Sequence[str], source: str, *, author: str) -> Change:
        """Let what entries say now from any other source go on as entries of their own, without the past of those."""
        with self._writing("set apart", author, note=_named(entries)) as write:
            for entry in entries:
                said = rows.alive_row(write.connection, entry_number(entry), write.revision - 1)
                if said is not None and said.source != source and not said.damaged:
                    kept = edited(said, text=None, value=None, source=said.source, valid_from=KEEP, valid_to=KEEP)
                    write.set_apart(said, as_fact(kept))
            return _finished(write)

    def is_purged(self, entry: str) -> bool:
        """Whether an entry was deleted for good."""
        with self._connections.reading() as connection:
            return rows.is_purged(connection, entry_number(entry))

    def purge(self, *entries: str, author: str) -> Purge:
        """Delete entries for good, with all their versions, from the file and its log. It takes time by all that is kept.

        A purge that was cut off goes on when it is called again with the same entries.

        Raises:
            Locked: If another process reads the old bytes meanwhile. They are in no revision then, but still in the log.
        """
        with self._connections.alone() as connection:
            wanted = [one for one in dict.fromkeys(entries) if not rows.is_purged(connection, entry_number(one))]
            if not wanted and purge.is_pending(connection):
                return Purge(rows.newest_revision(connection), tuple(entries), 0, (), self.finish_purge())
        with self._writing(versions.PURGE, author, note=_named(entries)) as write:
            done = purge.delete_rows(write, wanted or entries)
            write.finish(always=True)
        dropped = purge.drop_index(self.folder)
        purge.write_anew(self._connections)
        return replace(done, index_dropped=dropped)

    def finish_purge(self) -> bool:
        """Go on with a purge that was cut off, if one was. Returns whether an index was dropped. Raises Locked as `purge` does."""
        with self._connections.reading() as connection:
            if not purge.is_pending(connection):
                return False
        dropped = purge.drop_index(self.folder)
        purge.write_anew(self._connections)
        return dropped

    # --- revisions and versions

    def revision_at(self, at: int | str | None) -> int:
        """The revision that is meant: the newest, one by its number, one by its name. Raises NotFound if there is none."""
        with self._connections.reading() as connection:
            return versions.revision_at(connection, at)

    def revisions(self, *, after: int = -1, limit: int | None = None) -> list[Revision]:
        """The committed writes after a revision, oldest first."""
        with self._connections.reading() as connection:
            found = connection.execute(_REVISIONS, (after, -1 if limit is None else limit)).fetchall()
        return [_revision_of(one) for one in found]

    def changes_since(self, revision: int) -> Iterator[RowChange]:
        """What happened to rows after a revision, up to the newest, in order; within a revision births come first.

        A row that was purged since is told as purged alone.
        """
        return changes_between(self._connections, revision, self.revision)

    def rollback(self, to: int | str, *, author: str) -> Change:
        """Bring back the state of a revision or named version, as a new revision. What was purged does not return."""
        with self._writing("rollback", author) as write:
            target = versions.revision_at(write.connection, to)
            write.restores, write.note = target, str(to)
            versions.roll_back(write, target)
            return _finished(write)

    def undo(self, *, author: str) -> Change:
        """Take back the newest write that was not taken back yet. Raises Conflict if there is none, or it was a purge."""
        with self._writing(versions.UNDO, author) as write:
            target = versions.target_of_undo(write.connection)
            write.restores, write.note = target, str(target + 1)
            versions.roll_back(write, target)
            return _finished(write, always=True)

    def undone_by(self, revision: int) -> int:
        """The revision that an undo, which made `revision`, took back."""
        [undo] = self.revisions(after=revision - 1, limit=1)
        return int(undo.note)

    def name_version(self, name: str, *, author: str, at: int | str | None = None) -> NamedVersion:
        """Give a revision a name. Raises Conflict if the name is taken, NameRefused if it cannot be one."""
        versions.check_version_name(name)
        with self._connections.writing() as connection:
            version = NamedVersion(name, versions.revision_at(connection, at), now(), author)
            versions.name_version(connection, version)
            return version

    def remove_version(self, name: str) -> None:
        """Forget a name; the revision stays. Raises NotFound if there is no such version."""
        with self._connections.writing() as connection:
            versions.remove_version(connection, name)

    def versions(self) -> list[NamedVersion]:
        """All named versions, oldest revision first."""
        with self._connections.reading() as connection:
            return versions.versions_of(connection)

    def diff(self, before: int | str, after: int | str | None = None) -> list[Difference]:
        """The entries that two revisions have differently; the newest is compared with unless `after` is given."""
        with self._connections.reading() as connection:
            ends = (versions.revision_at(connection, before), versions.revision_at(connection, after))
            return list(versions.difference(connection, *ends))

    # --- relations and conflicts

    def relations(self) -> dict[str, Cardinality]:
        """The relations whose number of values was set here, in their normalised form."""
        with self._connections.reading() as connection:
            return Relations(connection).set_here

    def cardinality_of(self, relation: str) -> Cardinality:
        """How many values a relation has at a time, in any spelling: as it was set here, or by default."""
        with self._connections.reading() as connection:
            return Relations(connection).of(relation_key_of(relation))

    def set_relation(self, relation: str, cardinality: Cardinality | None) -> None:
        """Let a relation have one value at a time, or several; None forgets what was set.

        It holds for what is written from now on. Values that then contradict each other are told by `conflicts`.
        """
        with self._connections.writing() as connection:
            set_relation(connection, relation, cardinality)

    def conflicts(self) -> list[Contradiction]:
        """Pairs of entries of which perhaps only one holds, and which nobody has settled; the first 10,000 of them.

        Of so many values of one relation there are half as many pairs as the square of their number.
        """
        with self._connections.reading() as connection:
            return list(islice(conflicts.contradictions(connection), conflicts.MOST_TOLD))

    def resolve(self, a: str, b: str, keep: Decision, *, author: str, text: str | None = None) -> Change:
        """Settle two entries: keep `a`, `b` or `both`, or `merge` them into `a`, which then says `text`.

        Without a text the merged entry has both values, or both sentences.

        Raises:
            UsageError: If it is one entry twice, or a text is given for anything but a merge.
        """
        if entry_number(a) == entry_number(b) or (text is not None and keep != "merge"):
            raise UsageError("Name two different entries, and give a text only where they are merged.")
        with self._writing("resolve", author, note=f"{a} {b} {keep}") as write:
            one, other = (rows.required(write.connection, entry) for entry in (a, b))
            if keep == "both":
                conflicts.settle(write.connection, one, other)
                write.leave(one.entry, other.entry)
            elif keep == "merge":
                write.edit(one, as_fact(conflicts.merged(one, other) if text is None else NewEntry(text)))
                if write.is_living(other.row):
                    write.remove(other)
            else:
                write.remove(other if keep == "a" else one)
            return _finished(write)

    # --- the file

    def check(self) -> check.Report:
        """Compare everything that is kept with its digests. Takes time by all that is kept, and waits for nobody."""
        with self._connections.reading():
            return check.check(self._connections.file, self._connections.mode)

    def close(self) -> None:
        """Give back the connections; the next use makes new ones."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self, operation: str, author: str, note: str = "") -> Iterator[Write]:
        with self._connections.writing() as connection:
            yield Write(connection, author, operation, note)


def _finished(write: Write, *, always: bool = False) -> Change:
    revision = write.finish(always=always)
    return Change(revision, write.added, write.superseded, write.removed, write.unchanged, write.numbers)


def _named(entries: Sequence[str]) -> str:
    """Entries in the note of a revision: all of a few, else how many."""
    return " ".join(entries) if len(entries) <= 10 else f"{len(entries)} entries"


def _revision_of(found: Sequence[Any]) -> Revision:
    number, at, author, operation, note, restores, born, ended = found
    moment = moment_of(at)
    assert moment is not None
    return Revision(number, moment, author, operation, note, restores, born, ended)


def _first_rows() -> str:
    """The rows of a memory in which nothing is yet."""
    moment = micros_of(now())
    digest = digest_of((0, moment, "", "create", "", None, 0, 0, 0, 0)).hex()
    return (
        f"INSERT INTO about (identity, made_at) VALUES ('{secrets.token_hex(8)}', {moment});"  # noqa: S608
        f"INSERT INTO revisions VALUES (0, {moment}, '', 'create', '', NULL, 0, 0, 0, 0, x'{digest}')"
    )
