"""Does a memory answer with what holds now? Streams of facts that are updated, withdrawn and made to depend on each other.

In the manner of FactConsolidation (MemoryAgentBench): statements come one after the other, later ones are newer, and questions
ask for what holds at the end. The resolver alone answers: rules take each sentence apart, the normalised subject and relation
decide what supersedes what, and a question is a look-up. No model judges, and none is asked. What is published of systems with a
language model lies at 30 to 51 % for several hops and at 1 to 3 % for what is no longer there, on streams of their own.

A second stream has other people's wording: the counterfactual edits of MQuAKE, first as they are, then as they are edited.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness import DATA, Benchmark

from nightschool.memory.entry import NewEntry
from nightschool.memory.facts.sentences import split_sentence
from nightschool.memory.store import MemoryStore

MQUAKE = DATA / "memory" / "mquake" / "MQuAKE-hard.json"
PEOPLE, UPDATES, HOPS = 400, 3, 3
# Wordings of one relation; `{}` is the subject, the value comes last or first.
WORDINGS: dict[str, tuple[str, ...]] = {
    "lives in": (
        "{s} lives in {v}.",
        "{s} now lives in {v}.",
        "{s} resides in the city of {v}.",
        "{s} has moved to {v}.",
    ),
    "works for": ("{s} works for {v}.", "{s} is employed by {v}.", "{s} currently works for {v}."),
    "mother": ("The mother of {s} is {v}.", "{s}'s mother is {v}.", "{v} is the mother of {s}."),
    "headquarters": ("The headquarters of {s} are located in {v}.", "{s}'s headquarters are in {v}."),
    "mayor": ("The mayor of {s} is {v}.", "{v} is the mayor of {s}.", "{s}'s mayor is {v}."),
}
KINDS = {"lives in": "person city", "works for": "person firm", "mother": "person person", "headquarters": "firm city",
         "mayor": "city person"}  # fmt: skip
NO_LONGER = {"lives in": "{s} no longer lives in {v}.", "works for": "{s} does not work for {v} any more.",
             "mayor": "{v} is no longer the mayor of {s}."}  # fmt: skip
# What says nothing certain about where somebody lives or works.
NOISE = ("{s} might move to {v}.", "{s} used to live in {v}.", "They say that {s} lives in {v}.", "{s} dreams of {v}.")


class Question(NamedTuple):
    """What is asked, relation after relation, and the right answer; None if nothing is known."""

    subject: str
    relations: tuple[str, ...]
    answer: str | None


class World:
    """Who lives where, works where, and so on, as it is now; and the sentences that made it so."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        syllables = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "ro", "su", "ta", "ve", "wi", "xo", "zu"]

        def name() -> str:
            return "".join(self.chance.choice(syllables) for _ in range(3)).capitalize()

        self.things = {
            "person": sorted({f"{name()} {name()}" for _ in range(PEOPLE)}),
            "city": sorted({name() + "ville" for _ in range(60)}),
            "firm": sorted({f"{name()} Works" for _ in range(60)}),
        }
        self.now: dict[tuple[str, str], str | None] = {}
        self.sentences: list[str] = []

    def say_all(self) -> None:
        """State everything, then change it again and again, withdraw some of it, with noise between."""
        facts = [(s, relation) for relation, kinds in KINDS.items() for s in self.things[kinds.split()[0]]]
        for round_ in range(UPDATES + 1):
            self.chance.shuffle(facts)
            for subject, relation in facts:
                if round_ and self.chance.random() < 0.5:
                    continue
                value = self.chance.choice(self.things[KINDS[relation].split()[1]])
                old = self.now.get((subject, relation))
                if round_ and old is not None and relation in NO_LONGER and self.chance.random() < 0.2:
                    self.sentences.append(NO_LONGER[relation].format(s=subject, v=old))
                    self.now[subject, relation] = None
                    continue
                self.sentences.append(self.chance.choice(WORDINGS[relation]).format(s=subject, v=value))
                self.now[subject, relation] = value
                if self.chance.random() < 0.1:
                    person, city = (self.chance.choice(self.things[kind]) for kind in ("person", "city"))
                    self.sentences.append(self.chance.choice(NOISE).format(s=person, v=city))

    def questions(self) -> dict[str, list[Question]]:
        known = {key: value for key, value in self.now.items() if value is not None}
        single = [Question(subject, (relation,), value) for (subject, relation), value in known.items()]
        absent = [
            Question(subject, (relation,), None) for (subject, relation), value in self.now.items() if value is None
        ]
        multi = [
            self._chain(one, first) for one in self.things["person"] for first in ("lives in", "works for", "mother")
        ]
        return {"single_hop": single, "multi_hop": multi, "withdrawn": absent}

    def _chain(self, subject: str, first: str) -> Question:
        """Questions of two or three relations, each about the answer of the one before."""
        after = {"person": ("lives in", "works for", "mother"), "city": ("mayor",), "firm": ("headquarters",)}
        relations, at, relation = [first], self.now[subject, first], first
        for _ in range(self.chance.randrange(1, HOPS)):
            relation = self.chance.choice(after[KINDS[relation].split()[1]])
            relations.append(relation)
            at = self.now.get((at, relation)) if at is not None else None
        return Question(subject, tuple(relations), at)


def answer(store: MemoryStore, question: Question) -> str | None:
    at: str | None = question.subject
    for relation in question.relations:
        found = store.about(at, relation) if at is not None else []
        at = found[0].value if len(found) == 1 else None
    return at


def generated(seed: int, folder: Path) -> dict[str, float]:
    """The share of right answers by kind; `cascade`: facts that only follow from one that changed."""
    world = World(seed)
    world.say_all()
    with MemoryStore.create(folder) as store:
        # What follows from where somebody lives is stated once, at first, and made untrue by the first move.
        derived = [f"The commute of {person} is short." for person in world.things["person"]]
        store.add([NewEntry(one) for one in [*world.sentences[: len(world.now)], *derived]], author="bench")
        store.add([NewEntry(one) for one in world.sentences[len(world.now) :]], author="bench")
        shares = {
            kind: sum(answer(store, one) == one.answer for one in questions) / len(questions)
            for kind, questions in world.questions().items()
        }
        moved = [one for one in world.things["person"] if len(store.history(store.about(one, "commute")[0].id)) == 1]
        stale = sum(bool(store.about(one, "commute")) for one in moved)
        shares["cascade"] = 1 - stale / len(moved)
        shares["statements"] = len(world.sentences)
        assert store.check().is_whole
    return shares


def mquake(folder: Path) -> dict[str, float]:
    """Edits of MQuAKE in its own wording; a question is its statement without the value, answered hop by hop."""
    cases = json.loads(MQUAKE.read_text("utf-8"))
    newest: dict[tuple[str, str], str] = {}
    before, after = [], []
    for case in cases:
        for edit in case["requested_rewrite"]:
            stated = edit["prompt"].format(edit["subject"])
            before.append(NewEntry(f"{stated} {edit['target_true']['str']}."))
            after.append(NewEntry(f"{stated} {edit['target_new']['str']}."))
            newest[edit["subject"], edit["prompt"]] = edit["target_new"]["str"]
    with MemoryStore.create(folder) as store:
        store.add(before, author="bench")
        store.add(after, author="bench")
        right = told = 0
        for (subject, prompt), value in newest.items():
            asked = split_sentence(f"{prompt.format(subject)} Something.")
            found = store.about(asked.subject, asked.relation) if asked is not None else []
            told += asked is not None
            right += [one.value for one in found] == [value]
    return {"mquake_single_hop": right / len(newest), "mquake_told": told / len(newest), "mquake_facts": len(newest)}


def main() -> None:
    bench = Benchmark("memory_conflicts", "Does a memory answer with what holds now?", {"single_hop": {"min": 0.95}})
    seeds = range(1 if bench.quick else 3)
    with tempfile.TemporaryDirectory() as name:
        runs = [generated(seed, Path(name) / str(seed)) for seed in seeds]
        figures = {key: round(sum(run[key] for run in runs) / len(runs), 4) for key in runs[0]}
        if MQUAKE.is_file():
            figures |= {key: round(value, 4) for key, value in mquake(Path(name) / "mquake").items()}
    bench.table([(key, f"{value:.4g}") for key, value in figures.items()])
    bench.finish(figures)


if __name__ == "__main__":
    main()
