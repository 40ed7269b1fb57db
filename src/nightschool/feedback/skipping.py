"""Whether a cycle would be in vain: nothing is new, or nothing changed."""

from __future__ import annotations

from dataclasses import dataclass

from nightschool.config.recipe import Recipe
from nightschool.feedback.adopted_facts import said_of_held
from nightschool.feedback.selection import Selection, digest_of


@dataclass(frozen=True)
class PreviousCycle:
    """What the last finished cycle of a schedule had before it, so that the next can tell whether anything changed."""

    data_fingerprint: str
    outcome: str


def fingerprint_of(recipe: Recipe, selection: Selection) -> str:
    """A digest of all that the outcome depends on. When and how it is served, or done as a job, changes nothing."""
    plain = recipe.as_plain()
    settings = {
        key: value for key, value in plain.items() if key not in ("schedule", "serve", "jobs", "start", "data", "base")
    }
    return digest_of({"base": recipe.base, "settings": settings, "data": selection.fingerprint})


def nothing_to_train(selection: Selection) -> str | None:
    """Why a run would learn nothing at all, whoever wants it; None if it would."""
    if selection.new or selection.shards is not None:
        return None
    if selection.num_held:
        return f"nothing to train: {said_of_held(selection.num_held)}"
    untrained = sum(one.num_untrained for one in selection.contradictions)
    if untrained:
        return f"nothing to train: {untrained} new examples contradict each other or a pin, and none is chosen yet"
    return "nothing to train: no source has anything that can be learned"


def reason_to_skip(
    recipe: Recipe, selection: Selection, fingerprint: str, previous: PreviousCycle | None
) -> str | None:
    """Why a cycle would be in vain: there is too little that is new, or nothing changed since the previous one."""
    wanted, num_new = recipe.schedule.min_new_examples, selection.num_new
    is_same = previous is not None and previous.data_fingerprint == fingerprint
    unchanged = f"nothing changed since the last cycle, which was {previous.outcome if previous else ''}"
    if selection.shards is not None:
        return f"{unchanged}: the same shards, the same recipe" if is_same else None
    if num_new == 0:
        return f"no new data: {selection.num_all} examples, all studied before"
    if num_new < wanted:
        return (
            f"too little new data: {num_new} new of {selection.num_all} examples, "
            f"and schedule.min_new_examples is {wanted}"
        )
    if is_same:
        return f"{unchanged}: the same {num_new} new examples, the same starting weights, the same recipe"
    return None
