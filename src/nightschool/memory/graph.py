"""A memory as a graph of entities, relations and observations, as clients of the Model Context Protocol know it.

Names and shapes are those of the reference server `server-memory`. An entity is a subject; its type is what it `is a`. A relation is an entry
whose value is another subject. An observation is any other entry of the subject: split into relation and value where a rule can tell
them, so that a new value takes the place of an old one, and kept as it is written otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nightschool.errors import UsageError
from nightschool.memory.entry import Change, MemoryEntry, NewEntry
from nightschool.memory.facts import as_fact, key_of
from nightschool.memory.facts.normalise import relation_key_of
from nightschool.memory.store import MemoryStore

MOST_ENTRIES = 2000
"""So many entries are read as a graph at once; clients put what they read before a model."""
TYPE = "is a"
OBSERVATION = "has observation"
SOURCE = "mcp"

Graph = dict[str, list[dict[str, Any]]]


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
        return self._graph(self.store.entries())

    def search(self, query: str, limit: int = 20) -> Graph:
        """The entities whose entries hold words of a query, with all that is said of them, and relations between them."""
        subjects = [one.subject for one in self.store.search(query, limit=limit) if one.subject is not None]
        return self.open(subjects)

    def open(self, names: Iterable[str]) -> Graph:
        """The entities of these names, and relations between them; names that nobody has are left out."""
        return self._graph(entry for name in _distinct(names) for entry in self.store.about(name))

    def _graph(self, entries: Iterable[MemoryEntry]) -> Graph:
        of_subject: dict[str, list[MemoryEntry]] = {}
        for one in entries:
            if one.subject_key is not None:
                of_subject.setdefault(one.subject_key, []).append(one)
        entities, relations = [], []
        for said in of_subject.values():
            name, types, observations = said[0].subject, [], []
            for one in said:
                if one.relation_key == relation_key_of(TYPE):
                    types.append(one.value)
                elif one.value is not None and key_of(one.value) in of_subject:
                    relations.append({"from": name, "to": one.value, "relationType": one.relation})
                else:
                    observations.append(_observed(one))
            entities.append({"name": name, "entityType": ", ".join(map(str, types)), "observations": observations})
        return {"entities": entities, "relations": relations}

    # --- writing

    def create_entities(self, entities: Sequence[dict[str, Any]]) -> Graph:
        """Write types and observations; returns the entities as they are now."""
        new = []
        for one in entities:
            new.append(NewEntry("", one["name"], TYPE, one["entityType"], SOURCE))
            new += [_observation(one["name"], content) for content in one["observations"]]
        self._add(new)
        return self.open(one["name"] for one in entities)

    def create_relations(self, relations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write relations; returns those that were not there."""
        fresh = [one for one in relations if not self._relations_like(one)]
        self._add([NewEntry("", one["from"], one["relationType"], one["to"], SOURCE) for one in fresh])
        return fresh

    def add_observations(self, observations: Sequence[dict[str, Any]]) -> Graph:
        """Write observations; returns the entities that they are about, as they are now."""
        self._add([_observation(one["entityName"], content) for one in observations for content in one["contents"]])
        return self.open(one["entityName"] for one in observations)

    def delete_entities(self, names: Sequence[str]) -> int:
        """End all that is said of entities, and relations to them; returns how many entries ended. History keeps them."""
        keys = {key_of(name) for name in names}
        about = [entry for name in _distinct(names) for entry in self.store.about(name)]
        to = [one for name in names for one in self.store.search(name, limit=MOST_ENTRIES) if _value_key(one) in keys]
        return self._remove([*about, *to])

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
        return [entry for entry in found if _value_key(entry) == key_of(one["to"])]

    # --- entry by entry

    def add(self, new: Sequence[NewEntry]) -> Change:
        """Remember facts, all or none."""
        return self._noted(self.store.add(new, author=self.author))

    def edit(self, entry: str, text: str) -> Change:
        """Let an entry say something else."""
        return self._noted(self.store.edit(entry, author=self.author, text=text))

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


def _observation(name: str, content: str) -> NewEntry:
    """A sentence whose subject is the entity, with or without its name before it, or what is written, as it is."""
    for sentence in (content, f"{name} {content}"):
        subject = as_fact(NewEntry(sentence)).subject
        if subject is not None and key_of(subject) == key_of(name):
            return NewEntry(sentence, source=SOURCE)
    return NewEntry("", name, OBSERVATION, content, SOURCE)


def _observed(entry: MemoryEntry) -> str:
    if entry.relation_key == relation_key_of(OBSERVATION):
        return str(entry.value)
    return entry.wording or entry.text


def _wordings(entry: MemoryEntry) -> list[str]:
    return [text for text in (entry.text, entry.wording, _observed(entry)) if text]


def _value_key(entry: MemoryEntry) -> str | None:
    return None if entry.value is None else key_of(entry.value)


def _distinct(names: Iterable[str]) -> list[str]:
    return list({key_of(name): name for name in names}.values())
