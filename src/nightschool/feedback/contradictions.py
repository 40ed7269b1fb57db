"""New examples that ask the same and answer it differently, or otherwise than a pinned answer.

To train both teaches neither, so a person chooses, or a rule. A person's later answer is no contradiction: it replaces what was
said before it, and what a file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from nightschool.data.example import CONVERSATIONS, Example
from nightschool.data.match import is_correct
from nightschool.data.study.forms import is_short_answer
from nightschool.data.study.questions import QuestionKey, context_key, question_key
from nightschool.feedback.pins import Pin

Rule = Literal["ask", "later", "all"]

# A longer answer is a text, of which two can be right.
_SHOWN_IN_NOTES = 5


@dataclass(frozen=True)
class Contradiction:
    """Examples that contradict each other, in their order, or the answer that is `pinned`; and which of them are trained."""

    examples: tuple[Example, ...]
    trained: tuple[bool, ...]
    pinned: str = ""

    @property
    def num_untrained(self) -> int:
        return self.trained.count(False)

    @property
    def text(self) -> str:
        """All of it on one line: what is asked, who says what, what is trained."""
        told = " | ".join(f"{one.answer} ({place_of(one)})" for one in self.examples)
        against = f" against the pinned answer {self.pinned}" if self.pinned else ""
        kept = [place_of(one) for one, trained in zip(self.examples, self.trained, strict=True) if trained]
        return f"{self.examples[0].question} → {told}{against}: {', '.join(kept) if kept else 'none'} is trained"

    @property
    def places(self) -> dict[str, Any]:
        """Where its answers stand, and which of them are trained, without a word of them."""
        told = list(zip(map(place_of, self.examples), self.trained, strict=True))
        return {
            "trained": [p for p, t in told if t],
            "untrained": [p for p, t in told if not t],
            "pinned": bool(self.pinned),
        }

    def to_json(self) -> dict[str, Any]:
        """For programs that show it."""
        told = [
            {"place": place_of(one), "answer": one.answer, "trained": trained}
            for one, trained in zip(self.examples, self.trained, strict=True)
        ]
        return {"question": self.examples[0].question, "told": told, "pinned": self.pinned or None}


def without_contradictions(
    new: Sequence[Example], rule: Rule, pins: Iterable[Pin] = ()
) -> tuple[list[Example], list[Contradiction]]:
    """What of new examples is trained, in its order, and what contradicts.

    Compared are short answers to one question, and corrections; the examiner says whether two of them are the same.

    Args:
        new: Examples of one night, the later of two behind the earlier.
        rule: Of those that contradict each other, `ask` trains none, `later` the last, `all` all.
        pins: Answers that must be kept. What contradicts one is never trained.
    """
    told: dict[QuestionKey, list[Example]] = {}
    for example in new:
        key = context_key(example) if is_short_answer(example) else None
        if key is not None:
            told.setdefault(key, []).append(example)
    pinned = {question_key(pin.question): pin for pin in pins}
    found: list[Contradiction] = []
    out: set[str] = set()
    for examples in told.values():
        pin = pinned.get(question_key(examples[0].question or "")) if pinned else None
        left = examples
        if pin is not None:
            wrong = tuple(one for one in examples if not _says(one, pin.answer))
            if wrong:
                found.append(Contradiction(wrong, (False,) * len(wrong), pin.answer))
            left = [one for one in examples if one not in wrong]
        if len(left) > 1:
            left, contradiction = _settled(left, rule)
            found += contradiction
        out |= {one.digest for one in examples} - {one.digest for one in left}
    return [example for example in new if example.digest not in out], found


def _settled(examples: list[Example], rule: Rule) -> tuple[list[Example], list[Contradiction]]:
    """Those that are trained of two and more that ask the same, and how they contradict each other, if they do."""
    said = [one for one in examples if one.source == CONVERSATIONS]
    if said and said[-1].corrects:
        return [said[-1]], []
    left = [one for one in examples if one.source != CONVERSATIONS or one is said[-1]]
    if rule == "all" or all(_agree(left[-1], one) for one in left[:-1]):
        return left, []
    trained = tuple(rule == "later" and (one is left[-1] or _agree(left[-1], one)) for one in left)
    kept = [one for one, is_trained in zip(left, trained, strict=True) if is_trained]
    return kept, [Contradiction(tuple(left), trained)]


def _agree(one: Example, other: Example) -> bool:
    return _says(one, other.answer or "", other) or _says(other, one.answer or "", one)


def _says(one: Example, expected: str, other: Example | None = None) -> bool:
    """Whether an example gives the expected answer, which is the other's."""
    key, alternatives = ((), ()) if other is None else (other.key, other.alternatives)
    return is_correct(one.answer or "", expected, question=one.question or "", key=key, alternatives=alternatives)


def place_of(example: Example) -> str:
    """Where an example came from, for people: `facts.json:3`, or `conversations: req-1`."""
    if example.source == CONVERSATIONS:
        return f"{CONVERSATIONS}: {example.id}"
    return f"{example.source}:{example.line}"


def notes_on(contradictions: Sequence[Contradiction]) -> list[str]:
    """What a report says of them: each on a line, at most five."""
    more = len(contradictions) - _SHOWN_IN_NOTES
    lines = [f"Contradiction: {one.text}." for one in contradictions[:_SHOWN_IN_NOTES]]
    return [*lines, *([f"{more} more questions are answered in different ways."] if more > 0 else [])]


def what_to_do(contradictions: Sequence[Contradiction], name: str) -> str:
    """How a person chooses."""
    advice = []
    if any(not one.pinned and not any(one.trained) for one in contradictions):
        advice.append(
            "take the wrong ones out of the data, or pin the right answer with nightschool pins add QUESTION ANSWER "
            f"--name {name}, or write study.contradictions: later"
        )
    if any(one.pinned for one in contradictions):
        advice.append(f"take out what contradicts a pin, or the pin itself (nightschool pins ls --name {name})")
    return f"To choose, {'; '.join(advice)}." if advice else ""


# --- on disk ------------------------------------------------------------------------------------------------------------


def to_rows(contradictions: Iterable[Contradiction]) -> list[dict[str, Any]]:
    """One row an example, which `Example.from_json` reads as such."""
    return [
        {**example.to_json(), "contradiction": number, "trained": trained, "pinned": one.pinned}
        for number, one in enumerate(contradictions)
        for example, trained in zip(one.examples, one.trained, strict=True)
    ]


def from_rows(rows: Iterable[dict[str, Any]]) -> list[Contradiction]:
    """What `to_rows` wrote."""
    found = []
    for _, group in groupby(rows, key=lambda row: row["contradiction"]):
        told = list(group)
        trained = tuple(bool(row["trained"]) for row in told)
        found.append(Contradiction(tuple(map(Example.from_json, told)), trained, told[0]["pinned"]))
    return found
