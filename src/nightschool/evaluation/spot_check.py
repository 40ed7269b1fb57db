"""Spot checks of a model in training: what it has learned at a step and how far it drifted, and which step is the best.

Pure: no file, no tensor. The limits are rules of the gate; a drift that was not measured stands in nobody's way, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nightschool.config.recipe import Recipe
from nightschool.config.rules import Rule, parse_rule
from nightschool.config.train import ENOUGH_LEARNED
from nightschool.evaluation.scores import Figure, Plain


@dataclass(frozen=True)
class SpotCheck(Plain):
    """What a model in training knew after `step` updates.

    `learned` is the share of the new questions that it answers; `drift` is that from what the run began with, in nats a token,
    None where it was not measured.
    """

    step: int
    learned: float
    drift: Figure = None

    @property
    def text(self) -> str:
        """`97% learned, drift 0.0513 nats a token`."""
        drifted = "" if self.drift is None else f", drift {self.drift:.4f} nats a token"
        return f"{self.learned:.0%} learned{drifted}"


@dataclass(frozen=True)
class Limits:
    """What a spot check must show; a rule of None is not applied."""

    learned: Rule | None = None
    drift: Rule | None = None

    @classmethod
    def to_end(cls, recipe: Recipe) -> Limits | None:
        """At which a run ends; None where it is not spot-checked."""
        stopping = recipe.train.early_stopping
        if stopping.every is None:
            return None
        gate = recipe.gate
        return cls(*_rules(stopping.learned or ENOUGH_LEARNED, stopping.drift or gate.drift))

    @classmethod
    def to_pass(cls, recipe: Recipe) -> Limits:
        """At which the gate would pass it, as far as it goes by these two; where that has no rule, those to end at."""
        stopping, gate = recipe.train.early_stopping, recipe.gate
        learned = (
            gate.new_facts
            if gate.new_facts and "champion" not in gate.new_facts
            else stopping.learned or ENOUGH_LEARNED
        )
        return cls(*_rules(learned, gate.drift or stopping.drift))

    def hold(self, check: SpotCheck) -> bool:
        """Whether both do."""
        return self.holds_learned(check) and self.holds_drift(check)

    def holds_learned(self, check: SpotCheck) -> bool:
        return self.learned is None or self.learned.holds(check.learned, None)

    def holds_drift(self, check: SpotCheck) -> bool:
        return self.drift is None or check.drift is None or self.drift.holds(check.drift, None)

    def merit(self, check: SpotCheck) -> tuple[float, ...]:
        """How good one is that passes, larger for better: what was learned, then how little it drifted; empty if it does not."""
        return (check.learned, -(check.drift or 0.0)) if self.hold(check) else ()

    @property
    def text(self) -> str:
        """`>= 95% and <= 0.1 nats a token`."""
        parts = [] if self.learned is None else [f"learned {self.learned.text}"]
        parts += [] if self.drift is None else [f"drift {self.drift.text} nats a token"]
        return " and ".join(parts)


def checks_in_vain(checks: Sequence[SpotCheck], limits: Limits) -> int:
    """Spot checks since the last that was better than all before it: closer to the limit of drift, or within it and knowing more."""
    best, in_vain = (False, -math.inf), 0
    for check in checks:
        within = limits.holds_drift(check)
        found = (within, check.learned if within else -(check.drift or 0.0))
        best, in_vain = (found, 0) if found > best else (best, in_vain + 1)
    return in_vain


def best_of(checks: Sequence[SpotCheck], limits: Limits) -> SpotCheck | None:
    """Of those that pass, the one that knows most; of equals the one that drifted least, then the earliest."""
    passing = [check for check in checks if limits.hold(check)]
    return max(passing, key=lambda check: (limits.merit(check), -check.step), default=None)


def _rules(learned: str | None, drift: str | None) -> tuple[Rule | None, Rule | None]:
    return (
        None if learned is None else parse_rule("new_facts", learned),
        None if drift is None else parse_rule("drift", drift),
    )
