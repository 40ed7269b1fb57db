"""A language model that judges what `nightschool eval` asked, as it judges for the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nightschool.cli.output import bold
from nightschool.config.judge import Judge
from nightschool.errors import UsageError

if TYPE_CHECKING:
    from nightschool.evaluation.model_judge import Judged

OFF = "off"
_SHOWN = 20


def judge_named(of_recipe: Judge, url: str | None, model: str | None) -> Judge | None:
    """Who judges: what the command line names, or else the recipe of the version's run; None for the rules alone.

    Raises:
        UsageError: If the command line names an address without a model, or something that is no address.
    """
    if url == OFF:
        if model is not None:
            raise UsageError("--judge off asks no model, and --judge-model names one. Leave one of them out.")
        return None
    given = {key: value for key, value in (("url", url), ("model", model)) if value is not None}
    if url is None and model is not None and of_recipe.url is None:
        raise UsageError(
            "--judge-model names a model, and there is no server to ask. Name it: --judge http://127.0.0.1:8001/v1."
        )
    try:
        judge = Judge.model_validate(of_recipe.model_dump() | given)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ").replace("gate.judge.model", "--judge-model")
        raise UsageError(f"--judge {url}: {why}.") from None
    return None if judge.url is None else judge


def judged_to_json(judged: Judged) -> dict[str, Any]:
    """Who judged, and what it changed."""
    changed = [one.to_json() for one in judged.candidate.answers if one.overruled]
    return {
        "name": judged.name,
        "asked": judged.asked,
        "unclear": judged.unclear,
        "changed": changed,
        "failure": judged.failure or None,
    }


def judged_lines(judged: Judged) -> list[str]:
    """The same for people."""
    if judged.failure:
        return [f"{'judge':<10} {judged.failure} These are the verdicts of the rules."]
    changed = [one for one in judged.candidate.answers if one.overruled]
    to_right = sum(one.correct for one in changed)
    unclear = f"; {judged.unclear} replies were unclear, and the rules' verdict stands" if judged.unclear else ""
    lines = [
        f"{'judge':<10} {judged.name} was asked about {judged.asked} of {len(judged.candidate.answers)} answers: "
        f"{to_right} are right and {len(changed) - to_right} wrong against the rules{unclear}"
    ]
    for one in changed[:_SHOWN]:
        lines.append(f"  {'✓' if one.correct else '✗'} {bold(one.question)}")
        lines.append(f"    expected {one.expected}")
        lines.append(f"    answered {one.answer}  (the rules said {'wrong' if one.correct else 'right'})")
    if len(changed) > _SHOWN:
        lines.append(f"  … and {len(changed) - _SHOWN} more (--json)")
    return lines
