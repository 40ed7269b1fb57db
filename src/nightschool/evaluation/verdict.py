"""What the gate found: the rules as they were judged, the figures and the answers behind them. All of it is JSON-able."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from nightschool.evaluation.scores import Kind, ProbeAnswer, ScoreSheet, figure_from_json, figure_to_json

Decision = Literal["promote", "refuse"]


@dataclass(frozen=True)
class AnswerPair:
    """One question with both answers. The champion's are None if there is no champion or it was not asked."""

    id: str
    kind: Kind
    wording: str
    question: str
    expected: str
    champion_answer: str | None
    champion_correct: bool | None
    candidate_answer: str
    candidate_correct: bool

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
        )

    @property
    def learned(self) -> bool:
        return self.candidate_correct and not self.champion_correct

    @property
    def lost(self) -> bool:
        return bool(self.champion_correct) and not self.candidate_correct


@dataclass(frozen=True)
class RuleResult:
    """One rule and how it was judged.

    `limit` is the rule as the recipe writes it, `threshold` the figure that it came to. `passed` is None if the rule
    could not be judged; `why` is one sentence. `examples` are the answers behind a figure that is not perfect.
    """

    rule: str
    limit: str
    unit: Literal["nats", "share"]
    threshold: float | None
    candidate: float | None
    champion: float | None
    passed: bool | None
    why: str
    examples: tuple[AnswerPair, ...] = ()

    def to_json(self) -> dict[str, Any]:
        row = {**vars(self), "examples": [vars(pair) for pair in self.examples]}
        return row | {name: figure_to_json(row[name]) for name in _FIGURES}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        figures = {name: figure_from_json(row[name]) for name in _FIGURES}
        return cls(**{**row, **figures, "examples": tuple(AnswerPair(**pair) for pair in row["examples"])})


_FIGURES = ("threshold", "candidate", "champion")


@dataclass(frozen=True)
class Figures:
    """What one version scored: its loss, how many questions of each kind it answered, and the champion's drift."""

    version: str
    heldout_loss: float | None
    heldout_tokens: int
    new_correct: int
    new_asked: int
    old_correct: int
    old_asked: int
    pins_correct: int
    pins_asked: int
    general_correct: int = 0
    general_asked: int = 0
    drift: float | None = None

    @classmethod
    def of(cls, sheet: ScoreSheet) -> Figures:
        counts: dict[str, int] = {}
        kinds: tuple[tuple[str, Kind], ...] = (("new", "new"), ("old", "old"), ("pins", "pin"), ("general", "general"))
        for name, kind in kinds:
            answers = sheet.of_kind(kind)
            counts[f"{name}_correct"] = sum(answer.correct for answer in answers)
            counts[f"{name}_asked"] = len(answers)
        return cls(sheet.version, sheet.heldout_loss, sheet.heldout_tokens, **counts, drift=sheet.drift)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "heldout_loss": figure_to_json(self.heldout_loss), "drift": figure_to_json(self.drift)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        figures = {name: figure_from_json(row.get(name)) for name in ("heldout_loss", "drift")}
        return cls(**{**row, **figures})


@dataclass(frozen=True)
class GateReport:
    """The decision and everything behind it. `candidate` and `champion` are references, `name@id`.

    In the first night of a name, `champion` is its base, and `champion_is_base` says so.
    `learned` and `lost` are all questions of any kind that only the candidate, or only the champion, answers.
    """

    decision: Decision
    candidate: str
    champion: str | None
    rules: tuple[RuleResult, ...]
    figures: tuple[Figures, ...]
    learned: tuple[AnswerPair, ...]
    lost: tuple[AnswerPair, ...]
    notes: tuple[str, ...]
    suggestions: tuple[str, ...]
    champion_is_base: bool = False

    @property
    def failed(self) -> list[RuleResult]:
        return [rule for rule in self.rules if rule.passed is False]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without NaN, which `from_json` reads back to an equal report."""
        return {
            "decision": self.decision,
            "candidate": self.candidate,
            "champion": self.champion,
            "champion_is_base": self.champion_is_base,
            "rules": [rule.to_json() for rule in self.rules],
            "figures": [row.to_json() for row in self.figures],
            "learned": [vars(pair) for pair in self.learned],
            "lost": [vars(pair) for pair in self.lost],
            "notes": list(self.notes),
            "suggestions": list(self.suggestions),
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read what `to_json` wrote. Keys that are not a report's, such as a time that was added, are left out."""
        known = {field.name for field in fields(cls)}
        return cls(
            **{
                **{key: value for key, value in row.items() if key in known},
                "rules": tuple(RuleResult.from_json(rule) for rule in row["rules"]),
                "figures": tuple(Figures.from_json(figures) for figures in row["figures"]),
                "learned": tuple(AnswerPair(**pair) for pair in row["learned"]),
                "lost": tuple(AnswerPair(**pair) for pair in row["lost"]),
                "notes": tuple(row["notes"]),
                "suggestions": tuple(row["suggestions"]),
            }
        )
