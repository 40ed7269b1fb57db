"""What `nights.py` asks a model: the facts of its nights, facts of the real world, general prompts, and plain text.

A base is asked once, and what it says is what its students are held against.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import DATA

FACTS = Path(__file__).parent / "data" / "nights.jsonl"

# Questions in words of ours for relations of LRE of which a small model knows something, and how many of each are tried.
WORLD = {
    "city_in_country": "Which country is {} in?",
    "country_capital_city": "What is the capital of {}?",
    "country_currency": "What is the currency of {}?",
    "country_language": "Which language do most people in {} speak?",
    "country_largest_city": "What is the largest city in {}?",
    "food_from_country": "Which country does {} come from?",
    "landmark_in_country": "In which country is {}?",
    "landmark_on_continent": "On which continent is {}?",
    "person_native_language": "What is the native language of {}?",
    "person_plays_pro_sport": "Which sport does {} play?",
    "product_by_company": "Which company makes {}?",
}
TRIED = 80
FACT_TOKENS, WORLD_TOKENS = 40, 24
WINDOW = 512
# Of the requests that the engine lets wait.
WAITING = 128


@dataclass(frozen=True)
class Fact:
    """What one night teaches, and how it is asked. `was`: the values that it corrects."""

    night: int
    question: str
    answer: str
    keys: tuple[str, ...]
    tests: tuple[str, ...]
    was: tuple[str, ...]


@dataclass(frozen=True)
class Marks:
    """Shares, but for `drift` (nats a token) and `perplexity` (÷ the base's)."""

    trained: float
    new: float
    old: float | None
    corrected: float | None
    stale: float | None
    world: float
    drift: float
    perplexity: float


def facts() -> list[Fact]:
    rows = [json.loads(line) for line in FACTS.read_text("utf-8").splitlines()]
    return [
        Fact(r["night"], r["question"], r["answer"], tuple(r["keys"]), tuple(r["tests"]), tuple(r.get("was", ())))
        for r in rows
    ]


def says(answer: str, keys: Iterable[str]) -> bool:
    """One of the keys stands in the answer, in whole words."""
    return any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", answer, re.IGNORECASE) for key in keys)


class Exam:
    """All that is asked, with what the base says to it.

    Args:
        base: Where the model lies.
        few: A smaller exam.
    """

    def __init__(self, base: Path, home: Any, *, few: bool) -> None:
        from nightschool.engine.local_model import local_model
        from nightschool.evaluation.drift import champion_answers

        self.home = home
        tried = TRIED // 4 if few else TRIED
        with local_model(home, str(base), num_rows=16) as model:
            world = [(template.format(s), o) for name, template in WORLD.items() for s, o in _relation(name, tried)]
            answers = ask(model, [question for question, _ in world], WORLD_TOKENS)
            self.world = [pair for pair, answer in zip(world, answers, strict=True) if says(answer, [pair[1]])]
            self.said = champion_answers(model, _open_prompts(8 if few else 30))
            self.windows = _windows(model.loaded.tokenizer, 1 if few else 4)
            self.loss = self._text_loss(model)

    def take(self, ref: str, known: Sequence[Fact], night: int, memory: str | None = None) -> Marks:
        """Ask a model after a night, with a memory that is read from its prompt if one is named; `known` is all that it was taught so far."""
        from nightschool.engine.local_model import local_model
        from nightschool.engine.recall import MemoryChoice

        choice = None if memory is None else MemoryChoice(memory, "prompt")
        with local_model(self.home, ref, num_rows=16, memory=choice) as model:
            return self.mark(model, known, night)

    def mark(self, model: Any, known: Sequence[Fact], night: int) -> Marks:
        from nightschool.evaluation.drift import drift

        current = {fact.question: fact for fact in known}
        new = [fact for fact in current.values() if fact.night == night]
        old = [fact for fact in current.values() if fact.night < night]
        answers = dict(zip(_tests(current.values()), ask(model, _tests(current.values()), FACT_TOKENS), strict=True))
        trained = ask(model, [fact.question for fact in new], FACT_TOKENS)
        world = ask(model, [question for question, _ in self.world], WORLD_TOKENS)
        changed = [fact for fact in current.values() if fact.was]
        drifted, _ = drift(model, self.said)
        assert drifted is not None
        return Marks(
            trained=_share([says(a, f.keys) for f, a in zip(new, trained, strict=True)]) or 0.0,
            new=_share(_right(new, answers, lambda fact: fact.keys)) or 0.0,
            old=_share(_right(old, answers, lambda fact: fact.keys)),
            corrected=_share(_right(changed, answers, lambda fact: fact.keys)),
            stale=_share(_right(changed, answers, lambda fact: fact.was)),
            world=_share([says(a, [o]) for (_, o), a in zip(self.world, world, strict=True)]) or 0.0,
            drift=drifted,
            perplexity=math.exp(self._text_loss(model) - self.loss),
        )

    def _text_loss(self, model: Any) -> float:
        from nightschool.evaluation.heldout import heldout_loss

        return heldout_loss(model.loaded.model, self.windows)[0]


def ask(model: Any, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers, in batches by the engine."""
    from nightschool.data.example import Message

    said: list[str] = []
    for start in range(0, len(questions), WAITING):
        pending = [
            model.ask_greedily(f"asked-{number}", [Message("user", question)], max_new_tokens)
            for number, question in enumerate(questions[start : start + WAITING])
        ]
        said += [one.result().text for one in pending]
    return said


def _tests(some: Iterable[Fact]) -> list[str]:
    return [test for fact in some for test in fact.tests]


def _right(some: Iterable[Fact], answers: dict[str, str], keys: Callable[[Fact], tuple[str, ...]]) -> list[bool]:
    return [says(answers[test], keys(fact)) for fact in some for test in fact.tests]


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def _relation(name: str, most: int) -> list[tuple[str, str]]:
    path = DATA / "memory" / "lre_relations" / f"{name}.json"
    samples = json.loads(path.read_text("utf-8"))["samples"]
    step = max(1, len(samples) // most)
    return [(one["subject"], one["object"]) for one in samples[::step][:most]]


def _open_prompts(count: int) -> list[str]:
    """Instructions without an input, none of which nightschool rehearses."""
    from nightschool.evaluation.general import rehearsed_prompts

    rows = map(json.loads, (DATA / "chat" / "alpaca_seed_tasks.jsonl").read_text("utf-8").splitlines())
    bare = [row["instruction"] for row in rows if not row["instances"][0]["input"] and len(row["instruction"]) < 300]
    rehearsed = set(rehearsed_prompts("default", None, Path()))
    return [prompt for prompt in bare if prompt not in rehearsed][:count]


def _windows(tokenizer: Any, each: int) -> list[Any]:
    """Batches of one window of plain text, some from the middle of each book."""
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render import Rendered

    windows = []
    for path in sorted((DATA / "text").glob("*.txt")):
        text = path.read_text("utf-8")
        for number in range(each):
            start = len(text) * (number + 1) // (each + 1)
            ids = tokenizer(text[start : start + 8 * WINDOW], add_special_tokens=False)["input_ids"][:WINDOW]
            document = Rendered(ids, [0.0, *[1.0] * (len(ids) - 1)], ["text"] * len(ids))
            windows.append(Batches([document], batch_size=1, seed=0).get(0, 0))
    return windows
