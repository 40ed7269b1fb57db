"""`nightschool memory adopt`: what a night could not teach, where it can be read to the letter."""

from __future__ import annotations

from nightschool.cli.memory import answer_change, counts_of
from nightschool.cli.output import answer, who
from nightschool.data.example import CONVERSATIONS, Example
from nightschool.evaluation.taught_facts import as_entry
from nightschool.feedback.adopted_facts import AdoptedFact, AdoptedFacts
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry, Version
from nightschool.views.places import facts_of


def adopt(name: str, version: str, /, *, all_: bool = False) -> None:
    """Remember the facts that a version was taught and does not know: those with a number, a date or an address. The memory is
    made if it is not there. No later night studies or asks them, unless their entries are ended.

    Args:
        name: The memory.
        version: NAME@VERSION or NAME@ALIAS; the gate must have asked it.
        all_: Take all that it does not know.
    """
    home = Home.find()
    registry = Registry(home)
    found = registry.resolve(version)
    _, facts = facts_of(registry, found)
    wanted = facts.unknown if all_ else facts.exact
    if not wanted:
        kept = f"knows all {len(facts.known)} facts that it was asked" if not facts.unknown else "knows all exact facts"
        hint = f"; --all takes the {len(facts.unknown)} others" if facts.unknown else ""
        answer({"name": name, "added": 0}, f"{found.ref} {kept}{hint}.", quiet="")
        return
    folder = memory_path(home, name)
    with MemoryStore.open(folder) if folder.exists() else MemoryStore.create(folder) as store:
        change = store.add([NewEntry(as_entry(one), source=_source(one, found)) for one in wanted], author=who())
        entries = zip(wanted, change.ids, strict=True)
        AdoptedFacts(home.database).add(
            found.name,
            [AdoptedFact(one.digest, name, store.identity, entry, found.id) for one, entry in entries],
        )
        said = (
            f"{name} is at revision {change.revision}: {counts_of(change) or 'nothing to change'}. The weights of {found.ref} know "
            f"{len(facts.known)} of {len(facts.known) + len(facts.unknown)} facts. Read both: nightschool chat {found.ref} --memory {name}"
        )
        answer_change(name, store, change, change.ids, said)


def _source(example: Example, version: Version) -> str:
    """Where a fact comes from: the conversation, so that it can be found when that is deleted, or the version that did not know it."""
    return example.id if example.source == CONVERSATIONS and example.id else version.ref
