"""The tiny language of the gate's rules: `<= champion + 0.02`, `<= 2%`, `>= 50%`.

    rule      := operator limit
    operator  := "<=" | "<" | ">=" | ">"
    limit     := number | "champion" [("+" | "-") number]
    number    := digits ["." digits] ["%" | "nats"]

A share is written `2%` or `0.02`; `champion - 5%` means five percentage points below the champion's share. A loss is
in nats per token; `champion + 5%` means five percent above the champion's loss.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

RuleName = Literal["holdout_loss", "forgetting", "new_facts", "general_lost", "drift", "preferences"]

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
_RULE = re.compile(
    r"\s*(?P<operator><=|>=|<|>)\s*"
    r"(?:(?P<champion>champion)(?:\s*(?P<sign>[+-])\s*(?P<offset>\d+(?:\.\d+)?|\.\d+)\s*(?P<offset_percent>%?))?"
    r"|(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<number_percent>%?))\s*(?P<unit>nats)?\s*"
)


@dataclass(frozen=True)
class RuleKind:
    """What the figure of a rule is, and in which direction it is better."""

    figure: Literal["nats", "share"]
    better: Literal["lower", "higher"]
    champion_has_one: bool
    example: str


RULES: Mapping[RuleName, RuleKind] = {
    "holdout_loss": RuleKind("nats", "lower", champion_has_one=True, example="<= champion + 0.02"),
    "forgetting": RuleKind("share", "lower", champion_has_one=False, example="<= 2%"),
    "new_facts": RuleKind("share", "higher", champion_has_one=True, example=">= 50%"),
    "general_lost": RuleKind("share", "lower", champion_has_one=False, example="<= 20%"),
    "drift": RuleKind("nats", "lower", champion_has_one=False, example="<= 0.5"),
    "preferences": RuleKind("share", "higher", champion_has_one=False, example=">= 50%"),
}


@dataclass(frozen=True)
class Rule:
    """One parsed rule. `text` is what was written, with single spaces.

    `number` is absolute, or the signed distance from the champion's figure if `relative_to_champion`. If `percent`,
    that distance is a share of the champion's own figure.
    """

    name: RuleName
    text: str
    operator: str
    number: float
    relative_to_champion: bool
    percent: bool

    def threshold(self, champion: float | None) -> float:
        """The figure to compare with, in the unit of the rule.

        Args:
            champion: The champion's figure. Needed only if the rule is relative to it.
        """
        if not self.relative_to_champion:
            return self.number
        assert champion is not None, "a relative rule needs the champion's figure"
        return champion + (champion * self.number if self.percent else self.number)

    def holds(self, candidate: float, champion: float | None) -> bool:
        """Whether the candidate's figure passes. A figure that is exactly at the limit passes `<=` and `>=`.

        Sums such as 0.1 + 0.2 are taken to nine decimals, so that their last bit decides nothing.
        """
        return _OPERATORS[self.operator](round(candidate, 9), round(self.threshold(champion), 9))


def parse_rule(name: RuleName, text: str) -> Rule:
    """Read one rule.

    Raises:
        ValueError: If the text is not a rule, or one that would ask for a worse model.
    """
    kind = RULES[name]
    text = text.strip()
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rule; write for example {kind.example!r}")
    better = match["operator"][0] == "<"
    if better != (kind.better == "lower"):
        fix = text.strip().translate(str.maketrans("<>", "><"))
        raise ValueError(
            f"{text!r} asks for a worse model, as {kind.better} is better here; write {fix!r} in its place"
        )
    relative = match["champion"] is not None
    if relative and not kind.champion_has_one:
        raise ValueError(
            f"{text!r} names the champion, with which this rule compares anyway; write for example {kind.example!r}"
        )
    if match["unit"] and kind.figure != "nats":
        raise ValueError(f"{text!r} is a share, and not in nats; write for example {kind.example!r}")
    percent_sign = bool(match["offset_percent"] or match["number_percent"])
    number = float(match["offset"] or match["number"] or 0) / (100 if percent_sign else 1)
    if kind.figure == "share" and number > 1:
        raise ValueError(f"{text!r} is a share above 100 %; write for example {kind.example!r}")
    if kind.figure == "nats" and percent_sign and not relative:
        raise ValueError(f"{text!r} gives nats in percent of nothing; write for example {kind.example!r}")
    return Rule(
        name=name,
        text=" ".join(text.removesuffix(match["unit"] or "").split()),
        operator=match["operator"],
        number=-number if match["sign"] == "-" else number,
        relative_to_champion=relative,
        percent=percent_sign and kind.figure == "nats",
    )
