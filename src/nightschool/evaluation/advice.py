"""What to do about a refusal: the one change that would most likely have passed, by the run's own curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nightschool.evaluation.effort import Effort
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.evaluation.verdict import RuleResult

# Facts trained in fewer wordings than this are known in those alone (Allen-Zhu and Li 2023, arXiv 2309.14316).
FEW_WORDINGS = 2.0
# A curve that would need longer than so many times the run is taken to rise no more.
_LONGEST = 4.0
_LARGEST_RATIO = 2.0
_EFFORT = frozenset({"new_facts", "general_lost", "drift"})
_FIXED = {
    "holdout_loss": (
        "The held-out loss rose, which is what too much training looks like. Lower train.epochs or "
        "train.learning_rate, or raise replay.ratio."
    ),
    "preferences": (
        "The candidate prefers the better answers less clearly than the champion does. Lower train.learning_rate or "
        "train.epochs, raise dpo.beta, or look for pairs that are the wrong way round."
    ),
    "judge": "Start the judge that gate.judge names and compare again, or take it out: then the examiner's rules decide alone.",
    "pins": (
        "A pinned answer is missing. Put its question and answer into the data so that it is studied again, raise "
        "replay.ratio, or unpin it if it is out of date."
    ),
}


def advise(failed: Sequence[RuleResult], effort: Effort) -> tuple[str, ...]:
    """One change for what was learned too little or unlearned too much, and one for each other rule that failed."""
    by_effort = {result.rule: result for result in failed if result.rule in _EFFORT}
    others = [_fixed(result, effort) for result in failed if result.rule not in _EFFORT]
    if not by_effort:
        return tuple(others)
    learned = by_effort.get("new_facts")
    moved = [result for name, result in by_effort.items() if name != "new_facts"]
    if learned is None:
        return (_unlearned(moved, effort), *others)
    return (_unlearned_and_not_learned(effort) if moved else _not_learned(learned, effort), *others)


def _fixed(result: RuleResult, effort: Effort) -> str:
    if result.rule == "holdout_loss" and result.candidate is not None and not math.isfinite(result.candidate):
        return "The weights are broken. Lower train.learning_rate, set train.max_grad_norm, or set train.dtype to fp32."
    if result.rule == "forgetting":
        ratio = max(1.0, 2 * effort.replay_ratio)
        return f"Old answers were lost, with {effort.replay_ratio:g} old examples for a new one. Write replay.ratio: {ratio:g}."
    return _FIXED[result.rule]


def _not_learned(rule: RuleResult, effort: Effort) -> str:
    """Nothing else is wrong."""
    if effort.studies and effort.wordings < FEW_WORDINGS:
        return (
            f"A new fact was trained in {_number(effort.wordings)} on the average, and what is trained in one wording is known in that one. "
            "Write study.write: rules, or give each fact in several."
        )
    longer = _steps_to(rule.threshold, effort.checks)
    if longer is not None:
        first, last = _tail(effort.checks)
        return (
            f"What was learned still rose when the run ended, {first.learned:.0%} at step {first.step} and {last.learned:.0%} at step "
            f"{last.step}: at that pace it is enough at about step {longer}. Write {_length(effort, longer / last.step)}."
        )
    if effort.checks:
        first, last = _tail(effort.checks)
        return (
            f"What was learned hardly rose any more, {first.learned:.0%} at step {first.step} and {last.learned:.0%} at step "
            f"{last.step}. Write {_rate(effort, 2)}."
        )
    looking = (
        ", with train.early_stopping.every: 20 steps, so that it ends as soon as it is enough" if effort.studies else ""
    )
    return f"The new facts did not stick. Write {_length(effort, 2)}{looking}."


def _unlearned(moved: Sequence[RuleResult], effort: Effort) -> str:
    """Enough was learned."""
    limits: Mapping[str, float | None] = {result.rule: result.threshold for result in moved}
    sooner = _soonest(effort, limits.get("drift"))
    if sooner is not None:
        last = next((check for check in effort.checks if check.step == effort.step), effort.checks[-1])
        return (
            f"At step {sooner.step} enough was known already ({sooner.text}); what came after it led away, to {last.text} at step "
            f"{last.step}. Write train.max_steps: {sooner.step}."
        )
    what = (
        "The candidate lost what nobody taught"
        if "general_lost" in limits
        else "The candidate answers general prompts otherwise"
    )
    return f"{what}. {_rehearse(effort)}"


def _unlearned_and_not_learned(effort: Effort) -> str:
    return f"It learned too little and lost too much, so that neither more nor less of the same will do. {_rehearse(effort)}"


def _rehearse(effort: Effort) -> str:
    if not effort.studies:
        return f"Write {_rate(effort, 0.5)}."
    if effort.rehearsed == 0:
        return "Nothing was rehearsed. Write rehearse.prompts: default."
    if effort.rehearsed < _LARGEST_RATIO:
        ratio = min(_LARGEST_RATIO, 2 * effort.rehearsed)
        return f"{effort.rehearsed:g} answers were rehearsed beside an example. Write rehearse.ratio: {ratio:g}."
    if not effort.adapter:
        return f"{effort.rehearsed:g} answers were rehearsed beside an example already. Write method: lora, which changes less."
    return f"{effort.rehearsed:g} answers were rehearsed beside an example already. Write {_rate(effort, 0.5)}."


def _soonest(effort: Effort, drift: float | None) -> SpotCheck | None:
    """The first spot check before the published one that knows as much as is needed, and drifted less, below the limit if there is one."""
    published = next((check for check in effort.checks if check.step == effort.step), None)
    if published is None or published.drift is None:
        return None
    for check in effort.checks:
        near = check.drift is not None and check.drift < published.drift and (drift is None or check.drift <= drift)
        if near and check.step < published.step and check.learned >= min(published.learned, _ENOUGH):
            return check
    return None


# A share of the new facts that is as good as all of them.
_ENOUGH = 0.95


def _tail(checks: Sequence[SpotCheck]) -> tuple[SpotCheck, SpotCheck]:
    """Where the second half of the curve begins, and its end."""
    return checks[(len(checks) - 1) // 2], checks[-1]


def _steps_to(threshold: float | None, checks: Sequence[SpotCheck]) -> int | None:
    """At which step the curve reaches the threshold, going on as in its second half; None where it rises too slowly."""
    if threshold is None or len(checks) < 2:
        return None
    first, last = _tail(checks)
    risen, steps = last.learned - first.learned, last.step - first.step
    if risen <= 0 or steps <= 0:
        return None
    needed = last.step + max(0.0, threshold - last.learned) * steps / risen
    return math.ceil(needed) if needed <= _LONGEST * last.step else None


def _length(effort: Effort, factor: float) -> str:
    if effort.max_steps is not None:
        return f"train.max_steps: {max(effort.max_steps + 1, math.ceil(effort.max_steps * factor))}"
    return f"train.epochs: {max(effort.epochs + 1, math.ceil(effort.epochs * factor))}"


def _rate(effort: Effort, factor: float) -> str:
    return f"train.learning_rate: {effort.learning_rate * factor:.3g}"


def _number(wordings: float) -> str:
    return "one wording" if wordings < 1.05 else f"{wordings:.1f} wordings"
