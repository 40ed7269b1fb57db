"""What an explicit memory holds: entries, their versions, and what a write changed.

A **row** is one version of an entry. Rows are numbered from 1 in the order in which they were written, and a number is never
used again. An **entry** is called after its first row: `m123`. A **revision** is one committed write; readers pin one.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from nightschool.errors import UsageError

_ID = re.compile(r"m([1-9][0-9]{0,17})")


def entry_id(number: int) -> str:
    """An entry's number as people write it: `m123`."""
    return f"m{number}"


def entry_number(entry: str) -> int:
    """The number of `m123`.

    Raises:
        UsageError: If it is no id of an entry.
    """
    match = _ID.fullmatch(entry)
    if match is None:
        raise UsageError(
            f"{entry[:80]!r} is no id of a memory entry. An id looks like m123; nightschool memory ls shows them."
        )
    return int(match[1])


@dataclass(frozen=True)
class NewEntry:
    """What is to be remembered: a sentence, or subject, relation and value, or both.

    Of a sentence alone the three are told by rules, where they can be (`facts.sentences`). `source` says where it comes from,
    `valid_from` and `valid_to` when it holds in the world; the end is not included, and None is open. `where` is the file and
    line where it was read, for messages.
    """

    text: str = ""
    subject: str | None = None
    relation: str | None = None
    value: str | None = None
    source: str = ""
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class MemoryEntry:
    """An entry as one row has it. Times are in UTC.

    `text` is the canonical statement, its value last; `wording` is what was written, where that differs. `subject`, `relation`
    and `value` are None together, where they cannot be told; the two keys are their normalised forms, which decide what
    supersedes what. `born` is the revision that made the row, `died` the one that ended it, `replaces` the row that it ended.
    One that is `damaged` is not what was written, as its checksum tells: people are shown it, marked, and no model reads it.
    """

    row: int
    entry: int
    text: str
    wording: str | None
    subject: str | None
    relation: str | None
    value: str | None
    subject_key: str | None
    relation_key: str | None
    source: str
    author: str
    valid_from: datetime | None
    valid_to: datetime | None
    recorded_at: datetime
    born: int
    died: int | None
    replaces: int | None
    damaged: bool = False

    @property
    def id(self) -> str:
        """How the entry is called, the same for all of its rows: `m123`."""
        return entry_id(self.entry)

    def is_in(self, revision: int) -> bool:
        """Whether a reader of that revision sees this row."""
        return self.born <= revision and (self.died is None or self.died > revision)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "row": self.row,
            "text": self.text,
            "wording": self.wording,
            "subject": self.subject,
            "relation": self.relation,
            "value": self.value,
            "source": self.source,
            "author": self.author,
            "valid_from": _shown(self.valid_from),
            "valid_to": _shown(self.valid_to),
            "recorded_at": self.recorded_at.isoformat(),
            "revision": self.born,
            "ended": self.died,
            "damaged": self.damaged,
        }

    @property
    def damage(self) -> str:
        """What is to be said of one that is damaged, and what helps."""
        return (
            f"Row {self.row} of {self.id} is not what was written: its checksum differs, so a bit of it has flipped. Edit it with its "
            f"whole text, end or purge it (nightschool memory rm), or restore the memory from a copy."
        )


@dataclass(frozen=True)
class RowChange:
    """What a revision did to one row.

    `born` comes with the entry; one that `replaces` a row has ended it, which is told as well. `purged` is of a row that is
    gone for good: whoever kept something of it deletes it, and whoever never heard of it has nothing to do.
    """

    revision: int
    kind: Literal["born", "died", "purged"]
    row: int
    entry: MemoryEntry | None = None


@dataclass(frozen=True)
class Change:
    """What a write did. `numbers` are the entries that it was about, in the order of what was given.

    `revision` is the one that the write made, or the newest one if there was nothing to change.
    """

    revision: int
    added: int = 0
    superseded: int = 0
    removed: int = 0
    unchanged: int = 0
    numbers: Sequence[int] = field(default_factory=lambda: array("q"))

    @property
    def ids(self) -> list[str]:
        """The entries' ids, one for each that was given."""
        return [entry_id(number) for number in self.numbers]

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "added": self.added,
            "superseded": self.superseded,
            "removed": self.removed,
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True)
class Revision:
    """One committed write: who did what, when. `restores` is the revision whose state an undo or a rollback brought back."""

    revision: int
    at: datetime
    author: str
    operation: str
    note: str
    restores: int | None
    born: int
    ended: int

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"at": self.at.isoformat()}


def micros_of(moment: datetime | None) -> int | None:
    """A moment as microseconds since 1970 in UTC; one without a zone is taken as UTC."""
    if moment is None:
        return None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def moment_of(micros: int | None) -> datetime | None:
    """The moment that so many microseconds since 1970 stand for."""
    return None if micros is None else _EPOCH + _MICROSECOND * micros


def parse_moment(text: str) -> datetime:
    """A date or a moment in ISO 8601; in UTC unless it says otherwise.

    Raises:
        ValueError: If it is neither.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _shown(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
