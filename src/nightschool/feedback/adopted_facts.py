"""Facts that a memory holds in place of weights: taught, not known after a night, and adopted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from nightschool.data.example import Example
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.tables import adopted_facts, is_name_in, key_of


@dataclass(frozen=True)
class AdoptedFact:
    """The entry that holds an example. `digest` is the example's, `memory` the full name, `identity` that of the very memory, and
    `version` the id of the version that did not know it.
    """

    digest: str
    memory: str
    identity: str
    entry: str
    version: str


class AdoptedFacts:
    """What was adopted of the examples of names, whether the entries are still there or not."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, facts: Iterable[AdoptedFact]) -> None:
        """Note adopted facts; one that a memory adopts again is in its newer entry."""
        with self._db.write() as connection:
            for fact in facts:
                there = _is(name, fact)
                connection.execute(adopted_facts.delete().where(*there))
                connection.execute(adopted_facts.insert().values(**key_of(name), **vars(fact), adopted_at=now()))

    def ls(self, name: str) -> list[AdoptedFact]:
        """The adopted facts of a name, oldest first."""
        query = sa.select(adopted_facts).where(*is_name_in(adopted_facts, name))
        with self._db.read() as connection:
            found = connection.execute(query.order_by(adopted_facts.c.adopted_at, adopted_facts.c.digest)).all()
        return [AdoptedFact(row.digest, row.memory, row.identity, row.entry, row.version) for row in found]


@dataclass(frozen=True)
class InMemories:
    """What of a name's data memories hold now, by the digests of examples.

    `held`: the memory of each; weights need not learn it. `taken_back`: what no memory holds any more, with the newest version that
    did not know it: it is new to the weights, whatever that version was taught.
    """

    held: Mapping[str, str] = field(default_factory=dict)
    taken_back: Mapping[str, str] = field(default_factory=dict)

    def without_held(self, examples: Iterable[Example]) -> list[Example]:
        """The examples that no memory holds."""
        return [example for example in examples if example.digest not in self.held]


HELD_NOWHERE = InMemories()


def said_of_held(num_held: int) -> str:
    """What people are told; the empty string where no memory holds anything."""
    if num_held == 0:
        return ""
    facts = "1 fact is" if num_held == 1 else f"{num_held:,} facts are"
    return f"{facts} held by memories, and not studied (nightschool memory adopt)."


def _is(name: str, fact: AdoptedFact) -> tuple[sa.ColumnElement[bool], ...]:
    mine = (adopted_facts.c.digest == fact.digest, adopted_facts.c.memory == fact.memory)
    return (*is_name_in(adopted_facts, name), *mine)
