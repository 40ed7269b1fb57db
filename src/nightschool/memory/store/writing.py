"""One write to a memory: what it adds and ends, as one revision, and what supersedes what."""

from __future__ import annotations

import sqlite3
from array import array
from dataclasses import dataclass, field

from nightschool.events import now
from nightschool.memory.entry import MemoryEntry, micros_of
from nightschool.memory.facts import Fact, key_of
from nightschool.memory.store.layout import ROW_COLUMNS, digest_of
from nightschool.memory.store.relations import SINGLE, Relations
from nightschool.memory.store.rows import ENTRY_COLUMNS, entry_of

_INSERT_COLUMNS = (*ROW_COLUMNS, "text_key", "digest")
_INSERT = f"INSERT INTO rows ({', '.join(_INSERT_COLUMNS)}) VALUES ({', '.join('?' * len(_INSERT_COLUMNS))})"  # noqa: S608
_END = "UPDATE rows SET died = ?, end_digest = ? WHERE row = ?"
_AT_ADDRESS = (
    f"SELECT {ENTRY_COLUMNS} FROM rows WHERE subject_key = ? AND relation_key = ? AND died IS NULL ORDER BY row"  # noqa: S608
)
_OF_SENTENCE = f"SELECT {ENTRY_COLUMNS} FROM rows WHERE text_key = ? AND died IS NULL ORDER BY row"  # noqa: S608


@dataclass
class Write:
    """A revision that is being written: it is there when the transaction ends, and not before."""

    connection: sqlite3.Connection
    author: str
    operation: str
    relations: Relations
    note: str = ""
    restores: int | None = None
    revision: int = 0
    last_row: int = 0
    moment: int = 0
    born: int = 0
    ended: int = 0
    added: int = 0
    superseded: int = 0
    removed: int = 0
    unchanged: int = 0
    numbers: array[int] = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        newest = self.connection.execute("SELECT max(revision), last_row FROM revisions").fetchone()
        self.revision, self.last_row = int(newest[0]) + 1, int(newest[1])
        self.moment = micros_of(now()) or 0

    def add(self, fact: Fact) -> None:
        """Remember a fact: as a new entry, or in the place of the entry that it supersedes, or not again."""
        single = fact.relation_key is not None and self.relations.of(fact.relation_key) == SINGLE
        rivals = [rival for rival in self._rivals(fact) if _overlap(rival, fact)]
        same = next((rival for rival in rivals if _says_the_same(rival, fact)), None)
        if same is not None and not (single and len(rivals) > 1):
            self.unchanged += 1
            self.numbers.append(same.entry)
        elif single and rivals:
            self._supersede(rivals, fact)
        else:
            self.numbers.append(self.insert(fact))
            self.added += 1

    def edit(self, old: MemoryEntry, fact: Fact) -> None:
        """Let an entry say something else. Others that the new statement supersedes end."""
        single = fact.relation_key is not None and self.relations.of(fact.relation_key) == SINGLE
        others = [rival for rival in self._rivals(fact) if rival.entry != old.entry and _overlap(rival, fact)]
        for other in others:
            if single or _says_the_same(other, fact):
                self.end(other)
                self.superseded += 1
        self.numbers.append(self.insert(fact, old))
        self.superseded += 1

    def remove(self, old: MemoryEntry) -> None:
        self.end(old)
        self.removed += 1
        self.numbers.append(old.entry)

    def insert(self, fact: Fact, old: MemoryEntry | None = None) -> int:
        """Write a row, in the place of `old` if that is given. Returns the number of its entry."""
        row = self.last_row + 1
        entry = row if old is None else old.entry
        if old is not None and old.died is None:
            self.end(old)
        kept = (
            row, entry, fact.text, fact.wording, fact.subject, fact.relation, fact.value, fact.subject_key,
            fact.relation_key, fact.source, self.author, fact.valid_from, fact.valid_to, self.moment, self.revision,
            None if old is None else old.row,
        )  # fmt: skip
        self._write_row(kept, fact.text_key)
        return entry

    def copy(self, old: MemoryEntry, text_key: int | None, replaces: int | None) -> None:
        """Write an ended row again as a new one: what it says, by whom and when it was recorded stay."""
        kept = (
            self.last_row + 1, old.entry, old.text, old.wording, old.subject, old.relation, old.value, old.subject_key,
            old.relation_key, old.source, old.author, micros_of(old.valid_from), micros_of(old.valid_to),
            micros_of(old.recorded_at), self.revision, replaces,
        )  # fmt: skip
        self._write_row(kept, text_key)

    def end(self, old: MemoryEntry) -> None:
        self.end_row(old.row)

    def end_row(self, row: int) -> None:
        self.connection.execute(_END, (self.revision, digest_of((row, self.revision)), row))
        self.ended += 1

    def finish(self, *, always: bool = False) -> int:
        """Enter the revision, if anything changed. Returns the newest revision."""
        if not (self.born or self.ended or always):
            return self.revision - 1
        kept = (
            self.revision, self.moment, self.author, self.operation, self.note, self.restores, self.last_row, self.born,
            self.ended,
        )  # fmt: skip
        self.connection.execute("INSERT INTO revisions VALUES (?,?,?,?,?,?,?,?,?,?)", (*kept, digest_of(kept)))
        return self.revision

    def _write_row(self, kept: tuple[object, ...], text_key: int | None) -> None:
        self.connection.execute(_INSERT, (*kept, text_key, digest_of(kept)))
        self.last_row += 1
        self.born += 1

    def _supersede(self, rivals: list[MemoryEntry], fact: Fact) -> None:
        """The newest of the rivals goes on as the same entry with the new value; the others end."""
        *others, newest = rivals
        for other in others:
            self.end(other)
        self.insert(fact, newest)
        self.numbers.append(newest.entry)
        self.superseded += len(rivals)

    def _rivals(self, fact: Fact) -> list[MemoryEntry]:
        """The entries that are about the same: by subject and relation, or by the sentence."""
        if fact.subject_key is not None:
            found = self.connection.execute(_AT_ADDRESS, (fact.subject_key, fact.relation_key))
        else:
            found = self.connection.execute(_OF_SENTENCE, (fact.text_key,))
        return [entry_of(one) for one in found]


def _says_the_same(old: MemoryEntry, fact: Fact) -> bool:
    if fact.value is not None:
        same = old.value is not None and key_of(old.value) == key_of(fact.value)
    else:
        same = key_of(old.text) == key_of(fact.text)
    return same and micros_of(old.valid_from) == fact.valid_from and micros_of(old.valid_to) == fact.valid_to


def _overlap(old: MemoryEntry, fact: Fact) -> bool:
    """Whether there is a time at which both hold. What held only before or after the other contradicts nothing."""
    old_from, old_to = micros_of(old.valid_from), micros_of(old.valid_to)
    old_is_before = old_to is not None and fact.valid_from is not None and old_to <= fact.valid_from
    old_is_after = old_from is not None and fact.valid_to is not None and fact.valid_to <= old_from
    return not (old_is_before or old_is_after)
