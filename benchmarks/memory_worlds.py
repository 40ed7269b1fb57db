"""What the benchmarks of the memory index ask about: a generated world of a million facts, and real questions of ParaRel and T-REx."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from harness import DATA

Floats = npt.NDArray[np.float32]

TREX = DATA / "memory" / "pararel_trex"
HALF, LENGTH = 128, 16
RELATIONS = 6
# Words that first, middle and last names are drawn from, and how much each counts in an address.
NAMES, WEIGHTS = (400, 40, 800), (1.0, 0.7, 1.0)
QUESTION_NOISE = (0.3, 0.5)

# What Wikidata calls the relations of T-REx.
LABELS = {
    "P1001": "applies to jurisdiction", "P101": "field of work", "P103": "native language", "P106": "occupation",
    "P108": "employer", "P127": "owned by", "P1303": "instrument", "P131": "located in", "P136": "genre",
    "P1376": "capital of", "P138": "named after", "P140": "religion", "P1412": "languages spoken",
    "P159": "headquarters location", "P17": "country", "P176": "manufacturer", "P178": "developer",
    "P19": "place of birth", "P190": "twinned city", "P20": "place of death", "P264": "record label",
    "P27": "country of citizenship", "P276": "location", "P279": "subclass of", "P30": "continent", "P31": "instance of",
    "P36": "capital", "P361": "part of", "P364": "original language", "P37": "official language", "P39": "position held",
    "P407": "language of work", "P413": "position played", "P449": "original network", "P463": "member of",
    "P47": "shares border with", "P495": "country of origin", "P527": "has part", "P530": "diplomatic relation",
    "P740": "location of formation", "P937": "work location",
}  # fmt: skip


def unit(vectors: Floats) -> Floats:
    """Rows as unit vectors."""
    made: Floats = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return made


class World:
    """Fictional people with names of three words, six facts each. An entry's tokens are the words, the relation, the value."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        rng = self.rng = np.random.default_rng(seed)
        first, middle, last = NAMES
        words = rng.standard_normal((sum(NAMES), HALF)).astype(np.float32)
        people = count // RELATIONS + 1
        drawn = rng.choice(first * middle * last, people, replace=False)
        parts = (drawn // (middle * last), first + drawn // last % middle, first + middle + drawn % last)
        self.names = np.stack(parts, axis=1).astype(np.int32)
        self.words, self.count = words, count
        self.subjects = self._of_names(self.names)
        self.relations = unit(rng.standard_normal((RELATIONS, HALF)).astype(np.float32))
        self.person, self.relation = np.arange(count) // RELATIONS, np.arange(count) % RELATIONS
        self.entry_of_row = np.arange(-1, count)

    def _of_names(self, names: npt.NDArray[np.int32]) -> Floats:
        return unit(sum(weight * self.words[names[:, place]] for place, weight in enumerate(WEIGHTS)))

    def tokens(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Lines of entries, [n, 16]; the value is drawn at random."""
        lines = np.zeros((len(entries), LENGTH), np.int32)
        lines[:, :3] = self.names[self.person[entries]] + 1
        lines[:, 3] = 1500 + self.relation[entries]
        lines[:, 4] = self.rng.integers(2000, 40_000, len(entries))
        return lines

    def addresses(self, entries: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Of subjects and relations of entries, [n, half] each."""
        return self.subjects[self.person[entries]], self.relations[self.relation[entries]]

    def questions(self, entries: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Addresses as a question about each entry would have them: near to the entry's, not the same."""
        return tuple(  # type: ignore[return-value]
            unit(part + noise * self.rng.standard_normal(part.shape).astype(np.float32) / np.sqrt(HALF))
            for part, noise in zip(self.addresses(entries), QUESTION_NOISE, strict=True)
        )

    def rescorer(self, subjects: Floats, relations: Floats) -> Rescorer:
        """Scores finalists exactly, from their tokens."""
        return Rescorer(self, subjects, relations)

    def scan(self, subjects: Floats, relations: Floats, k: int) -> npt.NDArray[np.int64]:
        """The `k` nearest entries of each question by a look at every one, best first, [b, k]."""
        by_person, by_relation = subjects @ self.subjects.T, relations @ self.relations.T
        found = []
        for people, kinds in zip(by_person, by_relation, strict=True):
            scores = people[self.person] + kinds[self.relation]
            top = np.argpartition(-scores, k)[:k]
            found.append(top[np.argsort(-scores[top])])
        return np.stack(found)


class Rescorer:
    """See `nightschool.memory.index.rescoring.Rescorer`."""

    certain, relation_weight = 0.9, 1.0

    def __init__(self, world: World, subjects: Floats, relations: Floats) -> None:
        self._world, self._asked = world, (subjects, relations)

    def __call__(self, lines):
        world, (subjects, relations) = self._world, self._asked
        of_names = world._of_names(lines.tokens[:, :3] - 1)
        of_relations = world.relations[lines.tokens[:, 3] - 1500]
        return (
            np.einsum("md,md->m", of_names, subjects[lines.queries]),
            np.einsum("md,md->m", of_relations, relations[lines.queries]),
        )


@dataclass(frozen=True)
class RealQuestions:
    """`facts`: subject, relation, value. `questions` with the number of the fact that each asks about."""

    facts: list[tuple[str, str, str]]
    questions: list[str]
    about: list[int]


def real_questions(count: int, *, seed: int = 0) -> RealQuestions | None:
    """Facts of T-REx, asked about in the words of ParaRel with the value left out; None if the data are not there."""
    if not TREX.is_dir():
        return None
    facts, patterns = [], {}
    for path in sorted((TREX / "trex").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        facts += [(row["sub_label"], LABELS[path.stem], row["obj_label"]) for row in rows]
    for path in sorted((TREX / "patterns").glob("*.jsonl")):
        patterns[LABELS[path.stem]] = [json.loads(line)["pattern"] for line in path.read_text().splitlines()]
    rng = random.Random(seed)
    about = rng.sample([place for place, fact in enumerate(facts) if fact[1] in patterns], count)
    questions = []
    for place in about:
        subject, relation, _ = facts[place]
        pattern = rng.choice(patterns[relation])
        questions.append(" ".join(pattern.replace("[X]", subject).replace("[Y]", "").split()))
    return RealQuestions(facts, questions, about)
