"""What the gate found: the rules as they were judged, the figures and the answers behind them. All of it is JSON-able."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nightschool.evaluation.effort import Effort
from nightschool.evaluation.scores import Figure, Kind, OpenPair, PairMargin, Plain, ProbeAnswer, ScoreSheet

Decision = Literal["promote", "refuse"]


@dataclass(frozen=True)
class AnswerPair(Plain):
    """One question with both answers. The champion's are None if there is no champion or it was not asked.

    `key` and `alternatives` are those of the example. An answer is `overruled` if a judge (`gate.judge`) changed its verdict.
    """

    id: str
    kind: Kind
    wording: str
    question: str
    expected: str
    champion_answer: str | None
    champion_correct: bool | None
    candidate_answer: str
    candidate_correct: bool
    key: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    champion_overruled: bool = False
    candidate_overruled: bool = False

    @classmethod
    def of(cls, candidate: ProbeAnswer, champion: ProbeAnswer | None) -> AnswerPair:
        return cls(
            id=candidate.id,
            kind=candidate.kind,
            wording=candidate.wording,
            question=candidate.question,
            expected=candidate.expected,
            champion_answer=champion.answer if champion else None,
            champion_correct=champion.correct if champion else None,
            candidate_answer=candidate.answer,
            candidate_correct=candidate.correct,
            key=candidate.key,
            alternatives=candidate.alternatives,
            champion_overruled=champion is not None and champion.overruled,
            candidate_overruled=candidate.overruled,
        )

    @property
    def learned(self) -> bool:
        return self.candidate_correct and not self.champion_correct

    @property
    def lost(self) -> bool:
        return bool(self.champion_correct) and not self.candidate_correct


@dataclass(frozen=True)
class PairMargins(Plain):
    """One held-out preference pair with the margin of both, in nats."""

    id: str
    question: str
    chosen: str
    rejected: str
    champion_margin: Figure
    candidate_margin: Figure

    @classmethod
    def of(cls, candidate: PairMargin, champion: PairMargin) -> PairMargins:
        return cls(
            candidate.id, candidate.question, candidate.chosen, candidate.rejected, champion.margin, candidate.margin
        )

    @property
    def gained(self) -> float:
        """By how many nats the candidate's margin is larger; minus infinity where it has none."""
        if self.candidate_margin is None or not math.isfinite(self.candidate_margin):
            return -math.inf
        if self.champion_margin is None or not math.isfinite(self.champion_margin):
            return math.inf
        return self.candidate_margin - self.champion_margin


@dataclass(frozen=True)
class RuleResult(Plain):
    """One rule and how it was judged.

    `limit` is the rule as the recipe writes it, `threshold` the figure that it came to. `passed` is None if the rule
    could not be judged; `why` is one sentence. `examples` are the answers, and `pairs` the preference pairs, behind a figure
    that is not perfect.
    """

    rule: str
    limit: str
    unit: Literal["nats", "share"]
    threshold: Figure
    candidate: Figure
    champion: Figure
    passed: bool | None
    why: str
    examples: tuple[AnswerPair, ...] = ()
    pairs: tuple[PairMargins, ...] = ()


@dataclass(frozen=True)
class Figures(Plain):
    """What one version scored: its loss, how many questions of each kind it answered, the champion's drift.

    `pairs_right` of `pairs_held_out` preference pairs are those whose better answer it finds likelier.
    """

    version: str
    heldout_loss: Figure
    heldout_tokens: int
    new_correct: int
    new_asked: int
    old_correct: int
    old_asked: int
    pins_correct: int
    pins_asked: int
    general_correct: int = 0
    general_asked: int = 0
    drift: Figure = None
    pairs_right: int = 0
    pairs_held_out: int = 0

    @classmethod
    def of(cls, sheet: ScoreSheet) -> Figures:
        counts: dict[str, int] = {}
        kinds: tuple[tuple[str, Kind], ...] = (("new", "new"), ("old", "old"), ("pins", "pin"), ("general", "general"))
        for name, kind in kinds:
            answers = sheet.of_kind(kind)
            counts[f"{name}_correct"] = sum(answer.correct for answer in answers)
            counts[f"{name}_asked"] = len(answers)
        counts["pairs_right"] = sum(pair.right for pair in sheet.margins)
        counts["pairs_held_out"] = len(sheet.margins)
        return cls(sheet.version, sheet.heldout_loss, sheet.heldout_tokens, **counts, drift=sheet.drift)


@dataclass(frozen=True)
class GateReport(Plain):
    """The decision and everything behind it. `candidate` and `champion` are references, `name@id`.

    In the first night of a name, `champion` is its base, and `champion_is_base` says so.
    `overruled` are those of which a judge changed a verdict.
    `open` are answers that no rule judges by themselves, those that drifted most first. `effort` is that of the run that made the candidate. `learned` and `lost` are all questions of any kind that only the candidate, or only the champion, answers.
    """

    decision: Decision
    candidate: str
    champion: str | None
    champion_is_base: bool = field(default=False, kw_only=True)
    rules: tuple[RuleResult, ...]
    figures: tuple[Figures, ...]
    learned: tuple[AnswerPair, ...]
    lost: tuple[AnswerPair, ...]
    notes: tuple[str, ...]
    suggestions: tuple[str, ...]
    overruled: tuple[AnswerPair, ...] = ()
    open: tuple[OpenPair, ...] = ()
    effort: Effort | None = None

    @property
    def failed(self) -> list[RuleResult]:
        return [rule for rule in self.rules if rule.passed is False]
