"""Which adopted facts memories hold now: an entry may have been ended, purged or rolled back since."""

from __future__ import annotations

from nightschool.errors import NotFound
from nightschool.feedback.adopted_facts import HELD_NOWHERE, AdoptedFact, AdoptedFacts, InMemories
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path


def in_memories(home: Home, name: str) -> InMemories:
    """What memories hold of the data of a name.

    An entry that says something else by now holds its fact all the same: it was corrected where it lies.

    Raises:
        Damaged, Locked: If a memory that adopted something cannot be read.
    """
    facts = AdoptedFacts(home.database).ls(name)
    if not facts:
        return HELD_NOWHERE
    there = {
        memory: _living(home, memory, [fact for fact in facts if fact.memory == memory])
        for memory in {fact.memory for fact in facts}
    }
    held = {fact.digest: fact.memory for fact in facts if fact.entry in there[fact.memory]}
    taken_back: dict[str, str] = {}
    for fact in facts:
        if fact.digest not in held:
            taken_back[fact.digest] = max(fact.version, taken_back.get(fact.digest, ""))
    return InMemories(held, taken_back)


def _living(home: Home, memory: str, facts: list[AdoptedFact]) -> set[str]:
    """The entries of these facts that are there in the newest revision; none if that memory is gone, or another has its name."""
    try:
        with MemoryStore.open(memory_path(home, memory)) as store:
            identity = store.identity
            return {fact.entry for fact in facts if fact.identity == identity and _is_there(store, fact.entry)}
    except NotFound:
        return set()


def _is_there(store: MemoryStore, entry: str) -> bool:
    try:
        store.get(entry)
    except NotFound:
        return False
    return True
