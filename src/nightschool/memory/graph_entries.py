"""How entities, relations and observations are entries of a memory, and back.

An entity is a subject; its type is what it `is a`. A relation is an entry whose value is another subject. An observation is any other
entry of the subject: split into relation and value where a rule can tell them, so that a new value takes the place of an old one, and
kept as it is written otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nightschool.memory.entry import MemoryEntry, NewEntry
from nightschool.memory.facts import as_fact, key_of
from nightschool.memory.facts.normalise import relation_key_of

TYPE = "is a"
OBSERVATION = "has observation"

Graph = dict[str, Any]
"""`entities` and `relations`, and `more` where that is not all."""
IsSubject = Callable[[str], bool]


# --- to entries


def entity_entries(
    name: str, entity_type: str, observations: Iterable[str], *, source: str, where: str = ""
) -> Iterator[NewEntry]:
    """An entity's type, if it has one, and its observations. Raises DataError if an observation is no fact."""
    if entity_type.strip():
        yield NewEntry("", name, TYPE, entity_type, source, where=where)
    for content in observations:
        yield observation_entry(name, content, source=source, where=where)


def relation_entry(subject: str, relation: str, to: str, *, source: str, where: str = "") -> NewEntry:
    """A relation from one entity to another."""
    return NewEntry("", subject, relation, to, source, where=where)


def observation_entry(name: str, content: str, *, source: str, where: str = "") -> NewEntry:
    """A sentence whose subject is the entity, with or without its name before it, or what is written, as it is.

    Raises:
        DataError: If it is empty or too long.
    """
    for sentence in (content, f"{name} {content}"):
        subject = as_fact(NewEntry(sentence)).subject
        if subject is not None and key_of(subject) == key_of(name):
            return NewEntry(sentence, source=source, where=where)
    return NewEntry("", name, OBSERVATION, content, source, where=where)


# --- from entries


def graph_of(entries: Iterable[MemoryEntry], is_subject: IsSubject | None = None) -> Graph:
    """The entities that entries are about, and relations from them; sentences about nobody are left out.

    Args:
        entries: All entries of a memory; or some, and then `is_subject` is needed.
        is_subject: Whether something is said of a name that none of the entries is about.
    """
    of_subject: dict[str, list[MemoryEntry]] = {}
    for one in entries:
        if one.subject_key is not None:
            of_subject.setdefault(one.subject_key, []).append(one)
    known = dict.fromkeys(of_subject, True)

    def is_known(key: str) -> bool:
        if key not in known:
            known[key] = is_subject is not None and is_subject(key)
        return known[key]

    entities = [entity_of(said, is_known) for said in of_subject.values()]
    relations = [
        relation_of(one, said[0]) for said in of_subject.values() for one in said if is_relation(one, is_known)
    ]
    return {"entities": entities, "relations": relations}


def entity_of(said: Sequence[MemoryEntry], is_subject: IsSubject) -> dict[str, Any]:
    """An entity of the entries about it, which are one or more."""
    types = [str(one.value) for one in said if is_type(one)]
    observations = [observed(one) for one in said if not is_type(one) and not is_relation(one, is_subject)]
    return {"name": said[0].subject, "entityType": ", ".join(types), "observations": observations}


def relation_of(entry: MemoryEntry, first: MemoryEntry) -> dict[str, Any]:
    """A relation; `first` is the first entry of its subject, which says how that is spelled."""
    return {"from": first.subject, "to": entry.value, "relationType": entry.relation}


def is_type(entry: MemoryEntry) -> bool:
    """Whether an entry says of what type its subject is."""
    return entry.relation_key == relation_key_of(TYPE)


def is_relation(entry: MemoryEntry, is_subject: IsSubject) -> bool:
    """Whether an entry leads to another entity. `is_subject` says of a normalised name whether something is said of it."""
    key = value_key(entry)
    return key is not None and not is_type(entry) and is_subject(key)


def observed(entry: MemoryEntry) -> str:
    """An entry as an observation says it."""
    if entry.relation_key == relation_key_of(OBSERVATION):
        return str(entry.value)
    return entry.wording or entry.text


def value_key(entry: MemoryEntry) -> str | None:
    """The normalised value; None if the entry has none."""
    return None if entry.value is None else key_of(entry.value)
