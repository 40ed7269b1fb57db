"""Which new facts are studied in forms, and how many in one night; the others wait, and are as new the next night."""

from __future__ import annotations

from collections.abc import Sequence

from nightschool.config.recipe import Recipe
from nightschool.data.example import CONVERSATIONS, Example
from nightschool.data.study.forms import is_short_answer, is_studied


def studied_in_forms(recipe: Recipe, new: Sequence[Example]) -> list[Example]:
    """Those new examples of which forms are made, as the recipe has it.

    A question and its answer may be news, or one row of a data set in which others ask the same in other words. So many rows are a data
    set; what people correct is news.
    """
    study = recipe.study
    if study.write == "off" or (study.write == "auto" and recipe.base.startswith("new:")):
        return []
    if study.write != "auto":
        return list(new)
    facts = [example for example in new if is_short_answer(example)]
    if study.facts_per_night is None or len(facts) <= study.facts_per_night:
        return facts
    return [example for example in facts if example.corrects]


def for_tonight(new: Sequence[Example], most: int | None) -> tuple[list[Example], int]:
    """New examples, of which at most so many facts, in their order; and how many facts wait.

    What people said goes first, then what stands first in the data: the oldest of both. Conversations and texts are no facts,
    and none of them waits.
    """
    facts = [example for example in new if is_studied(example)]
    if most is None or len(facts) <= most:
        return list(new), 0
    first = sorted(facts, key=lambda example: example.source != CONVERSATIONS)[:most]
    waiting = {example.digest for example in facts} - {example.digest for example in first}
    return [example for example in new if example.digest not in waiting], len(waiting)


def said_of_waiting(num_waiting: int, most: int | None) -> str:
    """What people are told; the empty string where nothing waits."""
    if num_waiting == 0:
        return ""
    nights = -(-num_waiting // (most or num_waiting))
    return f"{num_waiting:,} new facts wait for the next {nights:,} night{'s' if nights > 1 else ''}: study.facts_per_night is {most:,}."
