"""Entries, and what happened to them, in the words of mem0's API."""

from __future__ import annotations

import re
from typing import Any

from nightschool.errors import Conflict, NotFound
from nightschool.memory.entity_ids import EntityIds, ids_of, is_of
from nightschool.memory.entry import MemoryEntry
from nightschool.memory.entry_events import EntryEvent
from nightschool.memory.store import MemoryStore
from nightschool.server.memories.opened import Memories

_ID = re.compile(r"(.+)-(m[1-9][0-9]{0,17})")
_EVENTS = {"added": "ADD", "changed": "UPDATE", "ended": "DELETE", "unchanged": "NONE"}


class Mem0Memory:
    """One memory as mem0's client sees it: that of a set of ids, beside the one that the client's host names.

    Args:
        name: What it is called.
        store: Its entries.
        ids: Whose it is, where that is known; else it is told by the source of its entries.
    """

    def __init__(self, name: str, store: MemoryStore, ids: EntityIds | None = None) -> None:
        self.name, self.store, self._ids = name, store, ids

    def objects(self, entries: list[MemoryEntry]) -> list[dict[str, Any]]:
        """Entries as mem0's memories."""
        # An entry is called after its first row.
        firsts = self.store.rows([one.entry for one in entries])
        return [self._object(one, first or one) for one, first in zip(entries, firsts, strict=True)]

    def event(self, event: EntryEvent) -> dict[str, Any]:
        """What a write did to an entry."""
        return {
            "id": self._id(event.entry),
            "memory": _said(event.entry),
            "event": _EVENTS[event.kind],
            "previous_memory": _said(event.before) if event.kind == "changed" and event.before else None,
        }

    def past(self, events: list[EntryEvent]) -> list[dict[str, Any]]:
        """What happened to one entry."""
        first = events[0].entry
        return [
            {
                "id": f"{self._id(first)}-{number}",
                "memory_id": self._id(first),
                "event": _EVENTS[one.kind],
                "old_memory": _said(one.before) if one.before else None,
                "new_memory": _said(one.after) if one.after else None,
                **self._whose(one.entry, first),
                "metadata": _parts(one.entry),
                "created_at": events[0].at.isoformat(),
                "updated_at": one.at.isoformat(),
            }
            for number, one in enumerate(events, start=1)
        ]

    def _object(self, entry: MemoryEntry, first: MemoryEntry) -> dict[str, Any]:
        return {
            "id": self._id(entry),
            "memory": _said(entry),
            **self._whose(entry, first),
            "metadata": _parts(entry),
            "categories": [],
            "created_at": first.recorded_at.isoformat(),
            "updated_at": entry.recorded_at.isoformat(),
        }

    def _whose(self, entry: MemoryEntry, first: MemoryEntry) -> dict[str, str | None]:
        return (self._ids or ids_of(entry.source) or ids_of(first.source)).to_json()

    def _id(self, entry: MemoryEntry) -> str:
        return f"{self.name}-{entry.id}"


def memory_of_ids(memories: Memories, tenant: str, name: str, ids: EntityIds) -> Mem0Memory | None:
    """The memory of a set of ids beside the memory `name`; None if nothing was remembered for them.

    Raises:
        NotFound: If the tenant has no memory `name`, and none is shared with it.
    """
    memories.layers(tenant, name)
    try:
        return Mem0Memory(ids.memory(name), memories.store(tenant, ids.memory(name)), ids)
    except NotFound:
        if not ids:
            raise
        return None


def made_for_ids(memories: Memories, tenant: str, name: str, ids: EntityIds) -> Mem0Memory:
    """The memory of a set of ids, made if it is not there. Raises NotFound as `memory_of_ids` does."""
    found = memory_of_ids(memories, tenant, name, ids)
    if found is not None:
        return found
    own = ids.memory(name)
    try:
        return Mem0Memory(own, memories.create(tenant, own), ids)
    except Conflict:  # another request was faster
        return Mem0Memory(own, memories.store(tenant, own), ids)


def memory_with(memories: Memories, tenant: str, name: str, memory_id: str) -> tuple[Mem0Memory, str]:
    """The memory that holds an entry, and the entry's own id in it, by the id that mem0's client has of it.

    Raises:
        NotFound: If the id is none, or of another memory than `name` and those of ids beside it.
    """
    memories.layers(tenant, name)
    match = _ID.fullmatch(memory_id)
    if match is None or not is_of(match[1], name):
        raise NotFound(f"There is no memory {memory_id[:100]!r} here.")
    return Mem0Memory(match[1], memories.store(tenant, match[1])), match[2]


def _said(entry: MemoryEntry) -> str:
    return entry.wording or entry.text


def _parts(entry: MemoryEntry) -> dict[str, str | None] | None:
    if entry.subject is None:
        return None
    return {"subject": entry.subject, "relation": entry.relation, "value": entry.value}
