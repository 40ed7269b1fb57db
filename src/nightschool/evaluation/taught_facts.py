"""What a version knows of the facts that its run taught, and which of the others belong into an explicit memory.

A number, a date or an address is right or wrong to the letter: a model that is nearly right about it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nightschool.data.example import Example
from nightschool.data.match.english import read
from nightschool.data.match.key import key_of
from nightschool.data.match.tables import MONTHS
from nightschool.data.study.forms import with_wordings_kept_aside
from nightschool.data.study.rewordings import statement
from nightschool.evaluation.scores import ProbeAnswer, ScoreSheet
from nightschool.feedback.selection_files import read_forms, read_selection
from nightschool.store.runs import Run

_ADDRESS = re.compile(r"\S@\S|\b(?:https?://|www\.)\S|\b[\w-]+\.(?:com|org|net|io|de)\b", re.IGNORECASE)
_DAYS = frozenset(("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"))
_DATES = _DAYS | frozenset(MONTHS)


@dataclass(frozen=True)
class TaughtFacts:
    """Facts that were asked. One is `known` if all of its questions are answered."""

    known: tuple[Example, ...] = ()
    unknown: tuple[Example, ...] = ()

    @cached_property
    def exact(self) -> tuple[Example, ...]:
        """Those that are not known and need exactness."""
        return tuple(filter(needs_exactness, self.unknown))


def taught_facts(run: Run, sheet: ScoreSheet) -> TaughtFacts:
    """What the version with this score sheet knows of what its run taught.

    Raises:
        Damaged: If what the run selected was altered.
    """
    selection = read_selection(run.path)
    if selection is None:
        return TaughtFacts()
    answers: dict[tuple[str, str], list[ProbeAnswer]] = {}
    for answer in sheet.of_kind("new"):
        answers.setdefault((answer.question, answer.expected), []).append(answer)
    known: list[Example] = []
    unknown: list[Example] = []
    for example in with_wordings_kept_aside(selection.new, read_forms(run.path)):
        asked = [one for question in _questions(example) for one in answers.get((question, example.answer or ""), ())]
        if asked:
            (known if all(one.correct for one in asked) else unknown).append(example)
    return TaughtFacts(tuple(known), tuple(unknown))


def needs_exactness(example: Example) -> bool:
    """Whether what an answer adds to its question holds a number, a date or an address."""
    question, answer = example.question or "", example.answer or ""
    said = " ".join(example.key)
    if not said:
        key = key_of(question, answer)
        said = answer if key is None else " ".join(stem for part in key.parts for stem in part.stems)
    asked = {token.stem for token in read(question)}
    new = [token for token in read(said) if token.stem not in asked]
    return bool(_ADDRESS.search(answer)) or any(_has_digit(token.stem) or token.word in _DATES for token in new)


def _has_digit(stem: str) -> bool:
    return any(letter.isdigit() for letter in stem)


def as_entry(example: Example) -> str:
    """A fact as a sentence for a memory; where no rule makes one, the question and its answer."""
    question, answer = example.question or "", (example.answer or "").strip()
    return statement(question, answer) or f"{question.strip()} {answer}"


def _questions(example: Example) -> Sequence[str]:
    return tuple(dict.fromkeys((example.question or "", *example.paraphrases)))
