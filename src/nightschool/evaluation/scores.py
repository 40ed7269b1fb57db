"""What a version was asked and what it answered: the facts that the gate decides on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import PlainSerializer, TypeAdapter

from nightschool.data.match import RULES, is_correct, mentions


def figure_to_json(figure: float | None) -> float | str | None:
    """A figure for JSON, which has no NaN and no infinity: those become text."""
    return str(figure) if figure is not None and not math.isfinite(figure) else figure


Figure = Annotated[float | None, PlainSerializer(figure_to_json)]


class Plain:
    """A dataclass that plain JSON holds, without NaN."""

    def to_json(self) -> dict[str, Any]:
        kind: Any = type(self)
        return _adapter(kind).dump_python(self, mode="json")  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read what `to_json` wrote, now or before there were all fields. Other keys, such as a time, are left out."""
        kind: Any = cls
        return _adapter(kind).validate_python(row)  # type: ignore[no-any-return]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


Kind = Literal["new", "old", "pin", "general"]
Wording = Literal["paraphrase", "trained", "pinned", "general"]


@dataclass(frozen=True)
class ProbeQuestion(Plain):
    """One question with its expected answer.

    `messages` is the whole context as role and content, ending with the question. `wording` says whether the
    question was trained in these words. Of an answer, all parts of `key` must be said, if there are any; `alternatives` are as
    right as the expected answer. `id` is the same for the same kind, context and expected answer, in every
    process.
    """

    id: str
    kind: Kind
    question: str
    expected: str
    messages: list[dict[str, str]]
    wording: Wording = "trained"
    key: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()

    def answered(self, answer: str) -> ProbeAnswer:
        """Join the question and a version's answer, judged by `match.is_correct`, or by `match.mentions` if untaught."""
        return ProbeAnswer(**vars(self), answer=answer, correct=self._is_answered_by(answer))

    def _is_answered_by(self, answer: str) -> bool:
        if self.kind == "general":
            return mentions(answer, self.expected)
        return is_correct(answer, self.expected, question=self.question, key=self.key, alternatives=self.alternatives)

    def unanswered(self, prompt_tokens: int) -> ProbeAnswer:
        """The wrong answer of a version whose context does not hold the question."""
        return ProbeAnswer(**vars(self), overlong_tokens=prompt_tokens)


@dataclass(frozen=True)
class ProbeAnswer(ProbeQuestion):
    """A question with the answer that a version gave to it.

    It is `overruled` if a judge changed the verdict of the rules. `overlong_tokens` are those of a prompt that the version's context does not hold: it was not asked, and is wrong.
    """

    answer: str = ""
    correct: bool = False
    overruled: bool = False
    overlong_tokens: int | None = None

    def judged_anew(self) -> ProbeAnswer:
        """The same, judged by the rules of today, unless it was never asked or a judge decided."""
        if self.overruled or self.overlong_tokens is not None:
            return self
        return replace(self, correct=self._is_answered_by(self.answer))


@dataclass(frozen=True)
class PairMargin(Plain):
    """A preference pair that was held out, and how clearly a version prefers its better answer.

    `margin` is log p(chosen) − log p(rejected) in nats, each over the whole answer. `id` is the example's digest.
    """

    id: str
    question: str
    chosen: str
    rejected: str
    margin: Figure

    @property
    def right(self) -> bool:
        """Whether the better answer is the likelier one."""
        return self.margin is not None and self.margin > 0


@dataclass(frozen=True)
class OpenPair(Plain):
    """What both say to an open prompt, as far as they were asked, and how far the candidate drifted there, in nats a token."""

    prompt: str
    champion_answer: str
    candidate_answer: str
    drift: Figure


@dataclass(frozen=True)
class ScoreSheet(Plain):
    """All figures of one version.

    `version` is its reference, `name@id`, or for a base that no version was made of (`is_base`) what the recipe calls it.
    `heldout_loss` is in nats per token over `heldout_tokens` tokens; None if
    nothing was held out. `drift` is that of the champion in nats a token over `drift_tokens` tokens of its own answers, and `open` are these answers beside the candidate's, worst first; the
    champion has none. `rules` says by which of the examiner's rules the answers were judged (`match.RULES`); 0 before they were numbered. `margins` are those of the held-out preference pairs. A figure that is not finite stays what it is, also in JSON (as the text `nan` or `inf`).
    """

    version: str
    heldout_loss: Figure = None
    heldout_tokens: int = 0
    answers: tuple[ProbeAnswer, ...] = ()
    drift: Figure = None
    drift_tokens: int = 0
    open: tuple[OpenPair, ...] = ()
    is_base: bool = False
    margins: tuple[PairMargin, ...] = ()
    rules: int = 0

    def by_rules_of_today(self) -> ScoreSheet:
        """The same answers, judged as they would be today; those that a judge decided stay."""
        if self.rules == RULES:
            return self
        return replace(self, answers=tuple(answer.judged_anew() for answer in self.answers), rules=RULES)

    def of_kind(self, kind: Kind) -> list[ProbeAnswer]:
        return [answer for answer in self.answers if answer.kind == kind]
