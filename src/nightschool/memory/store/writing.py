"""One write to a memory: what it adds and ends, as one revision, and what supersedes what."""

from __future__ import annotations

import sqlite3
from array import array
from typing import NamedTuple

from nightschool.events import now
from nightschool.memory.entry import MemoryEntry, micros_of
from nightschool.memory.facts import Fact, key_of
from nightschool.memory.facts.retractions import StatementKey
from nightschool.memory.store.addresses import EVERY_ROW, address_of, at_addresses
from nightschool.memory.store.layout import ROW_COLUMNS, digest_of
from nightschool.memory.store.relations import SINGLE, Relations
from nightschool.memory.store.rows import fetched

_INSERT_COLUMNS = (*ROW_COLUMNS, "text_key", "digest")
_INSERT = f"INSERT INTO rows ({', '.join(_INSERT_COLUMNS)}) VALUES ({', '.join('?' * len(_INSERT_COLUMNS))})"  # noqa: S608
_END = "UPDATE rows SET died = ? WHERE row = ?"
_ADDRESS = "INSERT OR IGNORE INTO addresses VALUES (?, ?)"
_RIVALS = (
    f"SELECT row, entry, text, value, valid_from, valid_to FROM {at_addresses('address = :address')} "  # noqa: S608
    "WHERE died IS NULL AND subject_key IS :subject AND relation_key IS :relation AND text_key IS :text ORDER BY row"
)
# Rows wait for each other, because SQLite writes many at once in half the time.
_MOST_WAITING = 1000


class Rival(NamedTuple):
    """A living row that is about the same as something new. The period is in microseconds, as the file has it."""

    row: int
    entry: int
    text: str
    value: str | None
    valid_from: int | None
    valid_to: int | None


class Write:
    """A revision that is being written: it is there when the transaction ends, and not before.

    `added`, `superseded`, `removed` and `unchanged` count entries, `numbers` are those that the write was about.
    """

    def __init__(self, connection: sqlite3.Connection, author: str, operation: str, note: str = "") -> None:
        self.connection, self.author, self.operation, self.note = connection, author, operation, note
        self.restores: int | None = None
        newest = connection.execute("SELECT max(revision), last_row FROM revisions").fetchone()
        self.revision, self.last_row = int(newest[0]) + 1, int(newest[1])
        self.added = self.superseded = self.removed = self.unchanged = 0
        self.numbers: array[int] = array("q")
        self._relations = Relations(connection)
        self._moment = micros_of(now())
        self._born = self._ended = self._ended_rows = 0
        self._waiting: list[tuple[object, ...]] = []
        self._waiting_addresses: list[tuple[int, int]] = []
        self._are_waiting: set[int] = set()

    def add(self, fact: Fact) -> None:
        """Remember a fact: as a new entry, or in the place of the entry that it supersedes, or not again."""
        if fact.retracts is not None:
            self.take_back(fact.retracts)
        rivals = [rival for rival in self._rivals(fact) if overlap(rival, fact)]
        same = next((rival for rival in rivals if _says_the_same(rival, fact)), None)
        single = bool(rivals) and self._has_one_value(fact)
        if same is not None and not (single and len(rivals) > 1):
            self.leave(same.entry)
        elif single:
            # The newest goes on as the same entry with the new value; the others end.
            *others, newest = rivals
            for other in others:
                self.end(other.row)
            self.replace(newest.row, newest.entry, fact)
            self.superseded += len(rivals)
        else:
            self._insert(fact, None, None)
            self.added += 1

    def edit(self, old: MemoryEntry, fact: Fact) -> None:
        """Let an entry say something else. Others that the new statement supersedes end."""
        single = self._has_one_value(fact)
        for other in self._rivals(fact):
            if other.entry != old.entry and overlap(other, fact) and (single or _says_the_same(other, fact)):
                self.end(other.row)
                self.superseded += 1
        self.replace(old.row, old.entry, fact)
        self.superseded += 1

    def replace(self, row: int, entry: int, fact: Fact) -> None:
        """End a row, and let a new one of the same entry stand in its place."""
        self.end(row)
        self._insert(fact, entry, row)

    def set_apart(self, old: MemoryEntry, fact: Fact) -> None:
        """Let what an entry says go on as another one."""
        self.end(old.row)
        self._insert(fact, None, None)
        self.superseded += 1

    def take_back(self, statement: StatementKey) -> None:
        """End what says the very statement: the same subject, relation and value, or the same sentence, and nothing else."""
        if isinstance(statement, int):
            said = self._living(None, None, statement)
        else:
            subject_key, relation_key, value_key = statement
            said = [
                one for one in self._living(subject_key, relation_key, None) if key_of(one.value or "") == value_key
            ]
        for rival in said:
            self.end(rival.row)
            self.removed += 1

    def remove(self, old: MemoryEntry) -> None:
        self.end(old.row)
        self.removed += 1
        self.numbers.append(old.entry)

    def leave(self, *entries: int) -> None:
        """Note that entries stay as they are."""
        self.unchanged += len(entries)
        self.numbers.extend(entries)

    def is_living(self, row: int) -> bool:
        """Whether neither this write nor an earlier one has ended the row."""
        return (
            self.connection.execute("SELECT 1 FROM rows WHERE row = ? AND died IS NULL", (row,)).fetchone() is not None
        )

    def end(self, row: int) -> None:
        self.connection.execute(_END, (self.revision, row))
        self.count_ended(1, row)

    def count_ended(self, count: int, rows: int) -> None:
        """Count rows that were ended, and add up their numbers."""
        self._ended += count
        self._ended_rows += rows

    def count_copied(self, count: int) -> None:
        """Count rows that were written behind the last one."""
        self.last_row += count
        self._born += count

    def flush(self) -> None:
        """Hand the rows that wait to SQLite."""
        self.connection.executemany(_INSERT, self._waiting)
        self.connection.executemany(_ADDRESS, sorted(self._waiting_addresses))
        self._waiting.clear()
        self._waiting_addresses.clear()
        self._are_waiting.clear()

    def finish(self, *, always: bool = False) -> int:
        """Enter the revision, if anything changed. Returns the newest revision."""
        self.flush()
        if not (self._born or self._ended or always):
            return self.revision - 1
        kept = (
            self.revision, self._moment, self.author, self.operation, self.note, self.restores, self.last_row, self._born,
            self._ended, self._ended_rows,
        )  # fmt: skip
        self.connection.execute("INSERT INTO revisions VALUES (?,?,?,?,?,?,?,?,?,?,?)", (*kept, digest_of(kept)))
        return self.revision

    def _insert(self, fact: Fact, entry: int | None, replaces: int | None) -> None:
        row = self.last_row + 1
        entry = row if entry is None else entry
        kept = (
            row, entry, fact.text, fact.wording, fact.subject, fact.relation, fact.value, fact.subject_key,
            fact.relation_key, fact.source, self.author, fact.valid_from, fact.valid_to, self._moment, self.revision,
            replaces,
        )  # fmt: skip
        address = address_of(fact.subject_key, fact.relation_key, fact.text_key)
        self._waiting.append((*kept, fact.text_key, digest_of((*kept[1:-2], fact.text_key))))
        self._waiting_addresses.append((address, entry))
        self._are_waiting.add(address)
        self.numbers.append(entry)
        self.last_row += 1
        self._born += 1
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()

    def _has_one_value(self, fact: Fact) -> bool:
        return fact.relation_key is not None and self._relations.of(fact.relation_key) == SINGLE

    def _rivals(self, fact: Fact) -> list[Rival]:
        """The living rows that are about the same: by subject and relation, or by the sentence."""
        return self._living(fact.subject_key, fact.relation_key, fact.text_key)

    def _living(self, subject_key: str | None, relation_key: str | None, text_key: int | None) -> list[Rival]:
        address = address_of(subject_key, relation_key, text_key)
        if address in self._are_waiting:
            self.flush()
        keys = {"subject": subject_key, "relation": relation_key, "text": text_key}
        values = {"address": address, "until": EVERY_ROW, **keys}
        return [Rival(*one) for one in fetched(self.connection, _RIVALS, values)]


def _says_the_same(old: Rival, fact: Fact) -> bool:
    if fact.value is not None:
        same = old.value is not None and key_of(old.value) == key_of(fact.value)
    else:
        same = key_of(old.text) == key_of(fact.text)
    return same and (old.valid_from, old.valid_to) == (fact.valid_from, fact.valid_to)


def overlap(a: Rival | Fact, b: Rival | Fact) -> bool:
    """Whether there is a time at which both hold. What held only before or after the other contradicts nothing."""
    a_is_before = a.valid_to is not None and b.valid_from is not None and a.valid_to <= b.valid_from
    a_is_after = a.valid_from is not None and b.valid_to is not None and b.valid_to <= a.valid_from
    return not (a_is_before or a_is_after)
