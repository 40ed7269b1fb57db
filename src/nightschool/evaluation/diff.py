"""Answers that differ between two versions, word by word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nightschool.evaluation.scores import Kind, ScoreSheet

MAX_SHOWN_CHARACTERS = 240

Change = Literal["same", "removed", "added"]


@dataclass(frozen=True)
class AnswerDiff:
    """One question that two versions answer differently.

    `verdict`: `learned` if only the second answer is correct, `lost` if only the first is, else `reworded`.
    `words` are the parts of both answers in order, each the same in both, removed from the first, or added by the
    second. Joining those that are not `added` gives the first answer, and those that are not `removed` the second.
    """

    id: str
    kind: Kind
    question: str
    expected: str
    before: str
    after: str
    verdict: Literal["learned", "lost", "reworded"]
    words: tuple[tuple[Change, str], ...]

    def as_text(self) -> str:
        """One line: `lives in [-Oslo-]{+Bergen+}`."""
        marks = {"same": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}
        return "".join(marks[change].format(_printable(part)) for change, part in self.words)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "words": [list(part) for part in self.words]}


def answer_diff(before: ScoreSheet, after: ScoreSheet) -> list[AnswerDiff]:
    """Return the questions that both were asked and answered differently: lost first, then learned, then reworded."""
    earlier = {answer.id: answer for answer in before.answers}
    order = ("lost", "learned", "reworded")
    found = []
    for new in after.answers:
        old = earlier.get(new.id)
        if old is None or (old.answer == new.answer and old.correct == new.correct):
            continue
        verdict: Literal["learned", "lost", "reworded"] = "reworded"
        if old.correct != new.correct:
            verdict = "learned" if new.correct else "lost"
        parts = tuple(word_diff(old.answer, new.answer))
        found.append(AnswerDiff(new.id, new.kind, new.question, new.expected, old.answer, new.answer, verdict, parts))
    return sorted(found, key=lambda diff: order.index(diff.verdict))


def word_diff(before: str, after: str) -> Iterator[tuple[Change, str]]:
    """Yield the parts of both texts in order; words and the spaces between them are never split."""
    old, new = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    # autojunk would take frequent words of long answers for noise and mark them as changed.
    for operation, i, j, k, m in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        if operation == "equal":
            yield "same", "".join(old[i:j])
            continue
        if j > i:
            yield "removed", "".join(old[i:j])
        if m > k:
            yield "added", "".join(new[k:m])


def shortened(text: str) -> str:
    """One line of at most `MAX_SHOWN_CHARACTERS`, for a terminal."""
    line = _printable(" ".join(text.split()))
    return line if len(line) <= MAX_SHOWN_CHARACTERS else line[: MAX_SHOWN_CHARACTERS - 1] + "…"


def _printable(text: str) -> str:
    """Without control characters, so that an answer cannot move the cursor of a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
