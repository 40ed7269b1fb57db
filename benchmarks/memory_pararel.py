"""Real facts and patterns: ParaRel's T-REx, its subjects split between training and test, its values counterfactual in the test."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from typing import Any

from harness import DATA

from nightschool.data.example import NeededFact

PLACE = DATA / "memory" / "pararel_trex"
TEST_SHARE = 77  # of 256
PATTERNS_HELD_OUT = 1 / 3


@dataclass(frozen=True)
class Kind:
    """A relation: its patterns, of which the first is how entries are written, and its facts as subject and value."""

    patterns: tuple[str, ...]
    held_out: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def values(self) -> list[str]:
        return sorted({value for _, value in self.facts})


def kinds_of_data() -> dict[str, Kind]:
    """Relations with three patterns or more that end in the value; about a third of these are held out."""
    kinds = {}
    for path in sorted((PLACE / "patterns").iterdir()):
        patterns: list[str] = []
        for line in path.read_text().splitlines():
            pattern = re.sub(r"\s+", " ", re.sub(r"\s*\.$", "", json.loads(line)["pattern"].strip())).replace(" ,", ",")
            if pattern.endswith("[Y]") and pattern.count("[X]") == 1 and pattern[:-3].strip() not in patterns:
                patterns.append(pattern[:-3].strip())
        facts_file = PLACE / "trex" / path.name
        rows = [json.loads(line) for line in facts_file.read_text().splitlines()] if facts_file.exists() else []
        facts = {}
        for row in rows:
            if 2 < len(row["sub_label"]) < 40 and 1 < len(row["obj_label"]) < 30:
                facts.setdefault(row["sub_label"], row["obj_label"])
        if len(patterns) >= 3 and facts:
            rest = patterns[1:]
            random.Random(path.stem).shuffle(rest)
            held = max(1, round(len(patterns) * PATTERNS_HELD_OUT))
            kinds[path.stem] = Kind((patterns[0], *rest[held:]), tuple(rest[:held]), tuple(sorted(facts.items())))
    return kinds


def is_test(subject: str) -> bool:
    return hashlib.sha256(subject.encode()).digest()[0] < TEST_SHARE


def fact_of(kind: Kind, subject: str, value: str) -> NeededFact:
    pattern = kind.patterns[0]
    return NeededFact(f"{pattern.replace('[X]', subject)} {value}.", subject, pattern.replace("[X]", "").strip(), value)


def training_rows(kinds: dict[str, Kind], count: int, seed: int) -> list[dict[str, Any]]:
    """Facts of training subjects in all training patterns, as texts with the fact that they need."""
    chance, rows = random.Random(seed), []
    everything = [(kind, s, v) for kind in kinds.values() for s, v in kind.facts if not is_test(s)]
    for kind, subject, value in chance.sample(everything, min(count, len(everything))):
        prompt = chance.choice(kind.patterns).replace("[X]", subject)
        rows.append({"text": f"{prompt} {value}.", "fact": fact_of(kind, subject, value)._asdict()})
    return rows


def plain_rows(count: int) -> list[dict[str, Any]]:
    """Plain English, which needs no fact. Of another book than the perplexity is taken of."""
    text = (DATA / "text" / "jack-sheppard.txt").read_text("utf-8")[5000:]
    paragraphs = [part.split() for part in text.split("\n\n")]
    return [{"text": " ".join(words[:40])} for words in paragraphs if len(words) >= 20][:count]


@dataclass(frozen=True)
class Question:
    """A fact of a test subject: its number among all facts, its counterfactual value, and how it is asked, by column."""

    number: int
    value: str
    prompts: dict[str, str]


class Facts:
    """All facts of a memory, those of test subjects counterfactual; questions, and as many others that the memory then lacks."""

    def __init__(self, kinds: dict[str, Kind], count: int, seed: int) -> None:
        chance = random.Random(f"facts {seed}")
        # Patterns of different relations can be the same words; of a subject the first such fact is kept.
        told: dict[tuple[str, str], tuple[Kind, str, str]] = {}
        for kind in kinds.values():
            for subject, value in kind.facts:
                told.setdefault((subject, fact_of(kind, subject, value).relation), (kind, subject, value))
        new = [
            chance.choice([other for other in kind.values if other != value]) if is_test(subject) else value
            for kind, subject, value in told.values()
        ]
        rows = list(told.values())
        self.all = [fact_of(kind, subject, value) for (kind, subject, _), value in zip(rows, new, strict=True)]
        of_test = [number for number, (_, subject, _) in enumerate(rows) if is_test(subject)]
        chosen = chance.sample(of_test, 2 * count)

        def question(number: int) -> Question:
            kind, subject, _ = rows[number]
            patterns = {
                "efficacy": kind.patterns[0],
                "paraphrase_seen_patterns": chance.choice(kind.patterns[1:] or kind.patterns),
                "paraphrase_unseen_patterns": chance.choice(kind.held_out),
            }
            prompts = {column: pattern.replace("[X]", subject) for column, pattern in patterns.items()}
            return Question(number, new[number], prompts)

        self.asked = [question(number) for number in chosen[:count]]
        self.absent = [question(number) for number in chosen[count:]]
