"""Facts of examples as a memory writes them: what is read in training is what is read in answering."""

from __future__ import annotations

from dataclasses import replace

from nightschool.data.example import Example, NeededFact
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts.statements import as_fact


def as_remembered(example: Example) -> Example:
    """The example with its fact in the memory's words, where its parts are known; everything else stays.

    Raises:
        DataError: If a memory would refuse the fact.
    """
    fact = example.fact
    if fact is None or not (fact.subject and fact.relation and fact.value):
        return example
    return replace(example, fact=_written(fact))


def _written(fact: NeededFact) -> NeededFact:
    new = NewEntry(fact.text, subject=fact.subject, relation=fact.relation, value=fact.value)
    return fact._replace(text=as_fact(new).text)
