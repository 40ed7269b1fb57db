"""The gate: a candidate's score sheet, the champion's, and the recipe's rules go in; a report comes out.

Pure: no file, no clock, no model. A rule that cannot be judged (no champion, nothing held out, no old questions) says
so and does not stand in the way; a held-out loss that is not finite is always refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from nightschool.config.recipe import Gate
from nightschool.config.rules import RULES, Rule, RuleName, parse_rule
from nightschool.evaluation.advice import advise
from nightschool.evaluation.effort import Effort
from nightschool.evaluation.model_judge import Judged
from nightschool.evaluation.scores import ScoreSheet
from nightschool.evaluation.verdict import AnswerPair, Figures, GateReport, PairMargins, RuleResult

__all__ = ["GateReport", "RuleResult", "decide", "show"]


# Of fewer general questions that the champion answers, one that is lost by chance would decide.
FEWEST_GENERAL = 5


def decide(
    candidate: ScoreSheet,
    champion: ScoreSheet | None,
    rules: Gate,
    notes: Sequence[str] = (),
    judged: Judged | None = None,
    effort: Effort | None = None,
) -> GateReport:
    """Judge every rule of the recipe and decide.

    Args:
        candidate: What the new version scored.
        champion: What the served version scored on the same questions, in the first night the base; None if there is
            nothing that could be served.
        rules: The `gate` section of the recipe. A rule of None is not applied.
        notes: What else the report shall say.
        judged: How the judge took the sheets, where the recipe names one.
        effort: How the candidate was trained, from which the report says what to do about a refusal.
    """
    theirs = {answer.id: answer for answer in champion.answers} if champion else {}
    pairs = [AnswerPair.of(answer, theirs.get(answer.id)) for answer in candidate.answers]
    results = [
        result
        for result in (
            _holdout_loss(candidate, champion, rules.holdout_loss),
            _new_facts(pairs, champion, rules.new_facts),
            _lost("forgetting", "old", pairs, champion, rules.forgetting),
            _lost(
                "general_lost",
                "general",
                pairs,
                champion,
                None if rules.general is None else rules.general_lost,
                fewest=FEWEST_GENERAL,
            ),
            _drift(candidate, champion, rules.drift),
            _preferences(candidate, champion, rules.preferences),
            _pins(pairs, champion, rules.pins),
            _judge(judged),
        )
        if result is not None
    ]
    refused = any(result.passed is False for result in results)
    notes = list(notes)
    if candidate.drift is not None and rules.drift is None:
        notes.append(f"{_drifted(candidate)}; no rule looks at it.")
    if judged is not None and not judged.failure:
        notes.append(_said_by_judge(judged, pairs))
    if all(result.passed is None for result in results):
        notes.append(f"Nothing could be compared, so nothing speaks against {candidate.version}.")
    only_theirs = theirs.keys() - {answer.id for answer in candidate.answers}
    if only_theirs:
        notes.append(f"{_count(len(only_theirs), 'question')} went only to the champion and decided nothing.")
    return GateReport(
        decision="refuse" if refused else "promote",
        candidate=candidate.version,
        champion=champion.version if champion else None,
        rules=tuple(results),
        figures=tuple(Figures.of(sheet) for sheet in (candidate, champion) if sheet is not None),
        # Without a champion nobody knows what was known before; only the new can have been learned.
        learned=tuple(pair for pair in pairs if pair.learned and (champion or pair.kind == "new")),
        lost=tuple(pair for pair in pairs if pair.lost),
        notes=tuple(notes),
        suggestions=advise([result for result in results if result.passed is False], effort or Effort()),
        champion_is_base=champion is not None and champion.is_base,
        open=candidate.open,
        effort=effort,
        overruled=tuple(pair for pair in pairs if pair.candidate_overruled or pair.champion_overruled),
    )


def _holdout_loss(candidate: ScoreSheet, champion: ScoreSheet | None, text: str | None) -> RuleResult | None:
    loss = candidate.heldout_loss
    theirs = champion.heldout_loss if champion else None
    if loss is not None and not math.isfinite(loss):
        why = f"The candidate's held-out loss is {loss}, which no rule lets through."
        return RuleResult("holdout_loss", text or "finite", "nats", None, loss, theirs, passed=False, why=why)
    if text is None:
        return None
    rule = parse_rule("holdout_loss", text)
    not_judged = partial(_not_judged, rule, loss, theirs)
    if loss is None:
        return not_judged("Nothing was held out.")
    if rule.relative_to_champion:
        if champion is None:
            return not_judged("There is no champion to compare with.")
        if theirs is None:
            return not_judged("The champion has no held-out loss.")
        if champion.heldout_tokens != candidate.heldout_tokens:
            return not_judged(
                f"The candidate's loss is over {candidate.heldout_tokens} tokens and the champion's over "
                f"{champion.heldout_tokens}, so they cannot be compared."
            )
        if not math.isfinite(theirs):
            why = f"The champion's held-out loss is {theirs}, and the candidate's is finite."
            return RuleResult("holdout_loss", rule.text, "nats", None, loss, theirs, passed=True, why=why)
    return _judged(rule, loss, theirs, f"{loss:.4f} nats a token on {candidate.heldout_tokens} held-out tokens", ())


def _new_facts(pairs: Sequence[AnswerPair], champion: ScoreSheet | None, text: str | None) -> RuleResult | None:
    if text is None:
        return None
    rule = parse_rule("new_facts", text)
    new = [pair for pair in pairs if pair.kind == "new"]
    both = [pair for pair in new if pair.champion_correct is not None]
    share = _share(sum(pair.candidate_correct for pair in new), len(new))
    theirs = _share(sum(bool(pair.champion_correct) for pair in both), len(both))
    not_judged = partial(_not_judged, rule, share, theirs)
    if share is None:
        return not_judged("There was no new question to ask.")
    if rule.relative_to_champion and champion is None:
        return not_judged("There is no champion to compare with.")
    if rule.relative_to_champion and len(both) != len(new):
        return not_judged(f"The champion was asked {len(both)} of the {len(new)} new questions.")
    unanswered = tuple(pair for pair in new if not pair.candidate_correct)
    said = f"{len(new) - len(unanswered)} of {_count(len(new), 'new question')} answered"
    return _judged(rule, share, theirs, said, unanswered)


def _lost(
    name: RuleName,
    kind: str,
    pairs: Sequence[AnswerPair],
    champion: ScoreSheet | None,
    text: str | None,
    *,
    fewest: int = 1,
) -> RuleResult | None:
    """The share of what the champion answers of one kind that the candidate does not; judged from `fewest` answers on."""
    if text is None:
        return None
    rule = parse_rule(name, text)
    asked = [pair for pair in pairs if pair.kind == kind and pair.champion_correct is not None]
    known = [pair for pair in asked if pair.champion_correct]
    lost = tuple(pair for pair in known if pair.lost)
    share = _share(len(lost), len(known))
    not_judged = partial(_not_judged, rule, share, None)
    if champion is None:
        return not_judged("There is no champion that could know more.")
    if not asked:
        return not_judged(f"There was no {kind} question to ask.")
    if share is None:
        return not_judged(f"The champion answers none of the {len(asked)} {kind} questions, so none could be lost.")
    if len(known) < fewest:
        return not_judged(
            f"The champion answers {len(known)} of {_count(len(asked), f'{kind} question')}: too few to judge by."
        )
    said = f"{len(lost)} of {_count(len(known), f'{kind} answer')} that the champion gives lost"
    return _judged(rule, share, None, said, lost)


def _drift(candidate: ScoreSheet, champion: ScoreSheet | None, text: str | None) -> RuleResult | None:
    if text is None:
        return None
    rule = parse_rule("drift", text)
    if champion is None:
        return _not_judged(rule, None, None, "There is no champion to drift from.")
    if candidate.drift is None:
        return _not_judged(rule, None, None, "No open prompt was answered by both in one vocabulary.")
    if not math.isfinite(candidate.drift):
        return RuleResult(
            "drift", rule.text, "nats", None, candidate.drift, None, passed=False, why=_drifted(candidate)
        )
    return _judged(rule, candidate.drift, None, _drifted(candidate), ())


def _drifted(candidate: ScoreSheet) -> str:
    return (
        f"The champion's drift is {show(candidate.drift, 'nats')} nats a token over {candidate.drift_tokens} tokens "
        "that it answers to general prompts"
    )


def _preferences(candidate: ScoreSheet, champion: ScoreSheet | None, text: str | None) -> RuleResult | None:
    """The share of held-out pairs on which the candidate's margin is the larger one; one that is as large counts half.

    A margin is log p(chosen) − log p(rejected), so that this is DPO's reward accuracy with the champion as the reference.
    """
    if text is None:
        return None
    rule = parse_rule("preferences", text)
    theirs = {pair.id: pair for pair in champion.margins} if champion else {}
    both = [PairMargins.of(pair, theirs[pair.id]) for pair in candidate.margins if pair.id in theirs]
    if not candidate.margins:
        return _not_judged(rule, None, None, "No preference pair was held out.")
    if champion is None:
        return _not_judged(rule, None, None, "There is no champion to compare with.")
    if not both:
        return _not_judged(rule, None, None, "The champion was given none of the held-out pairs.")
    larger = sum(pair.gained > 0 for pair in both)
    share = (larger + sum(pair.gained == 0 for pair in both) / 2) / len(both)
    said = (
        f"The better answer of {larger} of {_count(len(both), 'held-out pair')} gained on the worse one; "
        f"it is the likelier one in {sum(pair.right for pair in candidate.margins)} of {len(candidate.margins)}, "
        f"for the champion in {sum(pair.right for pair in champion.margins)} of {len(champion.margins)}"
    )
    fell = tuple(sorted((pair for pair in both if pair.gained < 0), key=lambda pair: pair.gained))
    return replace(_judged(rule, share, None, said, ()), pairs=fell)


def _pins(pairs: Sequence[AnswerPair], champion: ScoreSheet | None, wanted: Literal["all", "off"]) -> RuleResult | None:
    if wanted == "off":
        return None
    pins = [pair for pair in pairs if pair.kind == "pin"]
    kept = _share(sum(pair.candidate_correct for pair in pins), len(pins))
    theirs = _share(sum(bool(pair.champion_correct) for pair in pins), len(pins)) if champion else None

    result = partial(RuleResult, "pins", "all", "share", 1.0, kept, theirs)
    if not pins:
        return result(passed=None, why="No answer is pinned.")
    # An answer that the champion does not give either is no loss. Without a champion, the pins are the only measure.
    missing = [pair for pair in pins if not pair.candidate_correct]
    broken = [pair for pair in missing if pair.champion_correct is not False]
    if broken:
        why = (
            f"{len(broken)} of {_count(len(pins), 'pinned answer')} {'would be lost' if champion else 'is not given'}."
        )
        return result(passed=False, why=why, examples=tuple(broken))
    if missing:
        why = f"{len(missing)} of {_count(len(pins), 'pinned answer')} the champion does not give either; none is lost."
        return result(passed=True, why=why, examples=tuple(missing))
    return result(passed=True, why=f"{len(pins)} of {_count(len(pins), 'pinned answer')} given.")


def _judge(judged: Judged | None) -> RuleResult | None:
    """A judge that cannot be asked lets nobody through."""
    if judged is None or not judged.failure:
        return None
    why = f"{judged.failure} The verdicts are those of the rules alone."
    return RuleResult("judge", "asked", "share", None, None, None, passed=False, why=why)


def _said_by_judge(judged: Judged, pairs: Sequence[AnswerPair]) -> str:
    changed = sum(pair.candidate_overruled + pair.champion_overruled for pair in pairs)
    to_right = sum(
        (pair.candidate_overruled and pair.candidate_correct)
        + (pair.champion_overruled and bool(pair.champion_correct))
        for pair in pairs
    )
    said = (
        f"The judge {judged.name} was asked about {_count(judged.asked, 'answer')} and changed {_count(changed, 'verdict')}: "
        f"{to_right} to right, {changed - to_right} to wrong."
    )
    if judged.unclear:
        said += f" To {judged.unclear} it said neither right nor wrong; there the rules' verdict stands."
    return said


def _not_judged(rule: Rule, candidate: float | None, champion: float | None, why: str) -> RuleResult:
    return RuleResult(rule.name, rule.text, _unit(rule.name), None, candidate, champion, passed=None, why=why)


def _judged(
    rule: Rule, candidate: float, champion: float | None, said: str, examples: tuple[AnswerPair, ...]
) -> RuleResult:
    unit = _unit(rule.name)
    threshold = rule.threshold(champion)
    passed = rule.holds(candidate, champion)
    why = f"{said}; needed: {rule.operator} {show(threshold, unit)}."
    return RuleResult(rule.name, rule.text, unit, threshold, candidate, champion, passed, why, examples)


def _unit(name: RuleName) -> Literal["nats", "share"]:
    return RULES[name].figure


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def show(figure: float | None, unit: Literal["nats", "share"]) -> str:
    """A figure for people: `1.2340` nats, `97.5%`, `-` for none."""
    if figure is None:
        return "-"
    if unit == "nats" or not math.isfinite(figure):
        return f"{figure:.4f}"
    return f"{100 * figure:.1f}".removesuffix(".0") + "%"
