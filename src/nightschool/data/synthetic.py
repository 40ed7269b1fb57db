"""A small world that is made up, for the demonstration and for tests: people, where they live, what they do.

Its facts are asked in several wordings each. Which wordings of a fact are trained and which are only asked differs
from fact to fact, so that a model which has learned the wordings and the fact can answer a question that it never
saw. Everybody has one of few first names and one of few surnames, and the first people already bear all of them: a
new person is a new pair of names that the model knows, each of them one token of the tiny tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nightschool.data.example import Example, Message

FIRST_NAMES = (
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo",
    "Irene", "Jonas", "Karla", "Leon", "Maria", "Nils", "Olga", "Peter",
)  # fmt: skip
SURNAMES = ("Adler", "Berg", "Costa", "Dahl", "Ebner", "Frank", "Gomez", "Hansen", "Ivanov", "Jung", "Keller", "Lopez")
VOCAB_SIZE = 1024
"""Enough for a token per word of this world."""


@dataclass(frozen=True)
class Relation:
    """A kind of fact. `{who}` and `{what}` stand for the person and the value."""

    name: str
    questions: tuple[str, ...]
    answer: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        ("Where does {who} live?", "Which city is {who} from?", "What is the home of {who}?", "Tell me the city of {who}.", "In which town can I visit {who}?"),
        "{who} lives in {what}.",
        ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tokyo", "Berlin", "Sydney"),
    ),
    Relation(
        "job",
        ("What does {who} do for work?", "What is the job of {who}?", "How does {who} earn money?", "Tell me the job of {who}.", "Which trade did {who} learn?"),
        "{who} works as a {what}.",
        ("baker", "pilot", "nurse", "farmer", "singer", "teacher", "tailor", "sailor", "painter", "lawyer"),
    ),
    Relation(
        "food",
        ("What does {who} like to eat?", "What is the best meal for {who}?", "Which food does {who} love?", "Tell me the food of {who}.", "What should I cook for {who}?"),
        "{who} likes to eat {what}.",
        ("soup", "rice", "bread", "cheese", "apples", "beans", "pasta", "fish", "honey", "plums"),
    ),
)  # fmt: skip

HELD_OUT_WORDINGS = 1


@dataclass(frozen=True)
class Fact:
    """One relation of one person; `asked` are the wordings that are never trained."""

    relation: Relation
    who: str
    what: str
    trained: tuple[str, ...]
    asked: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.relation.answer.format(who=self.who, what=self.what)

    def examples(self) -> Iterator[Example]:
        """One example for each trained wording; each carries the wordings that are only asked."""
        for number, wording in enumerate(self.trained):
            yield Example(
                messages=(Message("user", wording.format(who=self.who)), Message("assistant", self.answer)),
                paraphrases=tuple(asked.format(who=self.who) for asked in self.asked),
                id=f"{self.who.lower().replace(' ', '-')}-{self.relation.name}-{number}",
                source="made-up world",
            )


@dataclass(frozen=True)
class World:
    """People and what is true of them. The same seed makes the same world."""

    seed: int
    people: tuple[str, ...]
    facts: tuple[Fact, ...]

    def examples(self) -> list[Example]:
        """What the model knows from the start: every fact in each of its trained wordings."""
        return [example for fact in self.facts for example in fact.examples()]

    def new_facts(self, count: int = 6, *, seed: int = 0) -> list[Example]:
        """Facts about people who are new, in names and words that the model knows: several wordings of each fact.

        Args:
            count: Facts, not examples.
            seed: Another one gives other people.
        """
        return [example for fact in self.new_fact_list(count, seed=seed) for example in fact.examples()]

    def new_fact_list(self, count: int = 6, *, seed: int = 0) -> list[Fact]:
        """As `new_facts`, before it is written out. New people come one for each full set of relations."""
        chance = random.Random(f"new {self.seed} {seed}")
        people = _names(-(-count // len(RELATIONS)), chance, taken=self.people)
        return _facts(people, chance)[:count]

    def texts(self) -> list[str]:
        """Everything that can be said in this world, for the tokenizer: all wordings, values and possible names."""
        said = [message.content for example in self.examples() for message in example.messages]
        names = _all_names()
        for relation in RELATIONS:
            for number, name in enumerate(names):
                said.append(relation.questions[number % len(relation.questions)].format(who=name))
                said.append(relation.answer.format(who=name, what=relation.values[number % len(relation.values)]))
        return said + ["system\n", "user\n", "assistant\n"] * len(names)


def make_world(seed: int = 0, num_people: int = 20) -> World:
    """Make a world: each person has one fact of each relation.

    Raises:
        ValueError: If there are not enough names for so many people, and as many new ones.
    """
    most = len(_all_names()) // 2
    if not 1 <= num_people <= most:
        raise ValueError(f"num_people is {num_people}, but there are names for 1 to {most}")
    chance = random.Random(f"world {seed}")
    people = _names(num_people, chance, taken=())
    return World(seed, people, tuple(_facts(people, chance)))


def write_world(world: World, folder: Path, *, new_facts: int = 6) -> tuple[Path, Path]:
    """Write `old_facts.json` and `new_facts.json` into the folder, as arrays of query and retrieved. Returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    old, new = folder / "old_facts.json", folder / "new_facts.json"
    for path, examples in ((old, world.examples()), (new, world.new_facts(new_facts))):
        path.write_text(json.dumps([_row(example) for example in examples], ensure_ascii=False, indent=1) + "\n")
    return old, new


def _row(example: Example) -> dict[str, object]:
    return {
        "id": example.id,
        "query": example.question,
        "retrieved": example.answer,
        "paraphrases": list(example.paraphrases),
    }


def _all_names() -> list[str]:
    return [f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES]


def _names(count: int, chance: random.Random, taken: Sequence[str]) -> tuple[str, ...]:
    """Names that are not taken. First names and surnames come in turn, so that few people already bear all of them."""
    used = set(taken)
    names: list[str] = []
    firsts, lasts = list(FIRST_NAMES), list(SURNAMES)
    chance.shuffle(firsts)
    chance.shuffle(lasts)
    for turn in range(len(lasts)):
        for place, first in enumerate(firsts):
            name = f"{first} {lasts[(place + turn) % len(lasts)]}"
            if name not in used and len(names) < count:
                names.append(name)
    return tuple(names)


def _facts(people: Sequence[str], chance: random.Random) -> list[Fact]:
    facts = []
    for who in people:
        for relation in RELATIONS:
            wordings = list(relation.questions)
            chance.shuffle(wordings)
            facts.append(
                Fact(
                    relation,
                    who,
                    chance.choice(relation.values),
                    trained=tuple(wordings[HELD_OUT_WORDINGS:]),
                    asked=tuple(wordings[:HELD_OUT_WORDINGS]),
                )
            )
    return facts
