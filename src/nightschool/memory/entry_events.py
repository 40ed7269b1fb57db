"""What happened to entries, one by one: through a write, and since they were made."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile, zip_longest
from typing import Literal

from nightschool.memory.entry import Change, MemoryEntry
from nightschool.memory.store import MemoryStore

Kind = Literal["added", "changed", "ended", "unchanged"]


@dataclass(frozen=True)
class EntryEvent:
    """What an entry said before, and what it says from then on; None where it said nothing."""

    kind: Kind
    at: datetime
    before: MemoryEntry | None
    after: MemoryEntry | None

    @property
    def entry(self) -> MemoryEntry:
        """The entry as it was left."""
        found = self.after or self.before
        assert found is not None
        return found


def events_of_write(store: MemoryStore, change: Change) -> list[EntryEvent]:
    """What a write did: an event for each fact that it was given, in their order, then one for each other entry that it ended."""
    born: dict[int, deque[MemoryEntry]] = defaultdict(deque)
    ended: list[int] = []
    if change.added or change.superseded or change.removed:
        changes = store.changes_since(change.revision - 1)
        for one in takewhile(lambda one: one.revision == change.revision, changes):
            if one.kind == "born" and one.entry is not None:
                born[one.entry.entry].append(one.entry)
            elif one.kind == "died":
                ended.append(one.row)
    replaced = {entry.replaces for entries in born.values() for entry in entries if entry.replaces is not None}
    before = {one.row: one for one in store.rows([*replaced, *ended]) if one is not None}
    at = _moment_of(store, change.revision)
    events = []
    for number, entry in zip(change.numbers, change.ids, strict=True):
        if born[number]:
            events.append(_born(born[number].popleft(), before, at))
        else:
            newest = store.history(entry)[-1]
            events.append(EntryEvent("unchanged", at, newest, newest))
    gone = [before[row] for row in ended if row in before and row not in replaced]
    return events + [EntryEvent("ended", at, one, None) for one in gone]


def events_of_entry(store: MemoryStore, entry: str) -> Iterator[EntryEvent]:
    """What happened to an entry, oldest first. Raises NotFound if there was never such an entry, or it was purged."""
    past = store.history(entry)
    by_row = {one.row: one for one in past}
    for one, following in zip_longest(past, past[1:]):
        yield _born(one, by_row, _moment_of(store, one.born))
        if one.died is not None and (following is None or following.replaces != one.row):
            yield EntryEvent("ended", _moment_of(store, one.died), one, None)


def _moment_of(store: MemoryStore, revision: int) -> datetime:
    # A row that was brought back keeps the moment when it was first recorded.
    return store.revisions(after=revision - 1, limit=1)[0].at


def _born(entry: MemoryEntry, rows: dict[int, MemoryEntry], at: datetime) -> EntryEvent:
    if entry.replaces is None:
        return EntryEvent("added", at, None, entry)
    return EntryEvent("changed", at, rows.get(entry.replaces), entry)
