"""A memory as a graph of entities, relations and observations, as clients of the Model Context Protocol know it.

Names and shapes are those of the reference server `server-memory`; how they are entries is told in `graph_entries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from nightschool.errors import UsageError
from nightschool.memory.entry import Change, MemoryEntry, NewEntry
from nightschool.memory.facts import key_of
from nightschool.memory.graph_entries import (
    Graph,
    entity_entries,
    graph_of,
    is_type,
    observation_entry,
    observed,
    relation_entry,
    value_key,
)
from nightschool.memory.store import MemoryStore

MOST_ENTRIES = 2000
"""So many entries are read as a graph at once; clients put what they read before a model."""
SOURCE = "mcp"


class KnowledgeGraph:
    """What is read from a store and written to it as a graph, or entry by entry. Raises what the store raises.

    `changed` says whether anything was written through it so far that was not there already.

    Args:
        store: The memory.
        author: Who writes, as the history names it.
    """

    def __init__(self, store: MemoryStore, author: str) -> None:
        self.store, self.author = store, author
        self.changed = False

    # --- reading

    def read(self) -> Graph:
        """All of it. Raises UsageError where that is more than `MOST_ENTRIES`."""
        count = self.store.count()
        if count > MOST_ENTRIES:
            raise UsageError(
                f"The memory holds {count:,} entries, more than the {MOST_ENTRIES:,} that are read at once. "
                "Use search_nodes or open_nodes."
            )
        return graph_of(self.store.sound_entries())

    def search(self, query: str, limit: int = 20) -> Graph:
        """The entities whose entries hold words of a query, with all that is said of them, and relations from them."""
        subjects = [one.subject for one in self.store.search(query, limit=limit) if one.subject is not None]
        return self.open(subjects)

    def open(self, names: Iterable[str]) -> Graph:
        """The entities of these names, and relations from them; names that nobody has are left out.

        Of more than `MOST_ENTRIES` entries the first are read, and `more` is true.
        """
        found: list[MemoryEntry] = []
        for name in _distinct(names):
            found += self.store.about(name, limit=MOST_ENTRIES + 1 - len(found))
            if len(found) > MOST_ENTRIES:
                return {**graph_of(found[:MOST_ENTRIES], self._is_subject), "more": True}
        return graph_of(found, self._is_subject)

    def _is_subject(self, name: str) -> bool:
        return bool(self.store.about(name, limit=1))

    # --- writing

    def create_entities(self, entities: Sequence[dict[str, Any]]) -> Graph:
        """Write types and observations; returns the entities as they are now."""
        new: list[NewEntry] = []
        for one in entities:
            new += entity_entries(one["name"], one["entityType"], one["observations"], source=SOURCE)
        self._add(new)
        return self.open(one["name"] for one in entities)

    def create_relations(self, relations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write relations; returns those that were not there."""
        fresh = [one for one in relations if not self._relations_like(one)]
        self._add([relation_entry(one["from"], one["relationType"], one["to"], source=SOURCE) for one in fresh])
        return fresh

    def add_observations(self, observations: Sequence[dict[str, Any]]) -> Graph:
        """Write observations; returns the entities that they are about, as they are now."""
        told = [(one["entityName"], content) for one in observations for content in one["contents"]]
        self._add([observation_entry(name, content, source=SOURCE) for name, content in told])
        return self.open(one["entityName"] for one in observations)

    def delete_entities(self, names: Sequence[str]) -> int:
        """End all that is said of entities, and relations to them; returns how many entries ended. History keeps them."""
        about = {name: self.store.about(name) for name in _distinct(names)}
        known = [name for name, said in about.items() if said]
        relations = [one for one in self.store.leading_to(known) if not is_type(one)] if known else []
        return self._remove([*chain.from_iterable(about.values()), *relations])

    def delete_observations(self, deletions: Sequence[dict[str, Any]]) -> int:
        """End observations that are worded so, as `read` shows them or as they were written; returns how many."""
        ended = []
        for one in deletions:
            name = one["entityName"]
            keys = {key_of(text) for said in one["observations"] for text in (said, f"{name} {said}")}
            ended += [entry for entry in self.store.about(name) if keys & {key_of(text) for text in _wordings(entry)}]
        return self._remove(ended)

    def delete_relations(self, relations: Sequence[dict[str, Any]]) -> int:
        """End relations; returns how many there were."""
        return self._remove([entry for one in relations for entry in self._relations_like(one)])

    def _relations_like(self, one: dict[str, Any]) -> list[MemoryEntry]:
        found = self.store.about(one["from"], one["relationType"])
        return [entry for entry in found if value_key(entry) == key_of(one["to"])]

    # --- entry by entry

    def add(self, new: Sequence[NewEntry]) -> Change:
        """Remember facts, all or none."""
        return self._noted(self.store.add(new, author=self.author))

    def edit(self, entry: str, text: str) -> Change:
        """Let an entry say something else."""
        return self._noted(self.store.edit(entry, author=self.author, text=text, source=SOURCE))

    def remove(self, ids: Sequence[str]) -> Change:
        """End entries."""
        return self._noted(self.store.remove(*ids, author=self.author))

    def _add(self, new: Sequence[NewEntry]) -> None:
        if new:
            self.add(new)

    def _remove(self, entries: Sequence[MemoryEntry]) -> int:
        ids = list(dict.fromkeys(one.id for one in entries))
        return self.remove(ids).removed if ids else 0

    def _noted(self, change: Change) -> Change:
        self.changed = self.changed or bool(change.added or change.superseded or change.removed)
        return change


def _wordings(entry: MemoryEntry) -> list[str]:
    return [text for text in (entry.text, entry.wording, observed(entry)) if text]


def _distinct(names: Iterable[str]) -> list[str]:
    return list({key_of(name): name for name in names}.values())
