"""Which general prompts a run rehearses: of nightschool, of files, of what users asked by day; nothing that is taught or asked tonight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from nightschool.config.recipe import GENERAL_OF_NIGHTSCHOOL, Recipe
from nightschool.config.rehearse import ASKED_BY_DAY
from nightschool.data.example import Example
from nightschool.data.study.rewordings import wording
from nightschool.evaluation.general import general_prompts, rehearsed_prompts
from nightschool.feedback.asked_by_day import AskedByDay, asked_by_day
from nightschool.feedback.pins import Pins
from nightschool.feedback.rehearsed_prompts import ChosenPrompts, RehearsedPrompt
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import Selection
from nightschool.store.home import Home


def choose_prompts(
    recipe: Recipe, home: Home, root: Path, selection: Selection, fits: Callable[[str], bool]
) -> ChosenPrompts:
    """The prompts that a run may rehearse, those first that are asked if there is not room for all.

    The sources take turns. What users asked comes newest first, all else in an order by the seed. Where nothing of what users
    asked is left and no other source is named, those of nightschool take its place, and the notes say so.

    Args:
        recipe: Whose prompts (`rehearse`), and whose conversations (`name`).
        home: Where conversations were recorded, and what was accepted and pinned.
        root: Where relative paths begin.
        selection: What the run studies.
        fits: Whether a prompt is short enough; asked only of what users wrote.

    Raises:
        NotFound, DataError: If a file cannot be read.
        UsageError: If personal data are to be replaced and the extra `redact` is not installed.
    """
    places = recipe.rehearse.prompts or []
    taken = _taken(recipe, home, root, selection)
    found: list[list[RehearsedPrompt]] = []
    notes: list[str] = []
    for place in places:
        if place != ASKED_BY_DAY:
            found.append(_of(place, recipe, root, taken))
            continue
        asked = asked_by_day(
            home,
            recipe.name,
            redact=recipe.rehearse.redact,
            most=recipe.rehearse.max_conversations,
            is_free=lambda prompt: wording(prompt) not in taken and fits(prompt),
        )
        found.append(list(asked.prompts))
        notes.append(_note(asked, recipe.name, [other for other in places if other != ASKED_BY_DAY]))
        if not asked.prompts and places == [ASKED_BY_DAY]:
            found.append(_of(GENERAL_OF_NIGHTSCHOOL, recipe, root, taken))
    once: dict[str, RehearsedPrompt] = {}
    for prompt in _in_turn(found):
        once.setdefault(prompt.question, prompt)
    return ChosenPrompts(tuple(once.values()), tuple(notes))


def _note(asked: AskedByDay, name: str, others: Sequence[str]) -> str:
    said = asked.text(name)
    if asked.prompts:
        return f"rehearse.prompts: {said}."
    return f"rehearse.prompts: {said}, so the prompts of {' and '.join(others) or 'nightschool (default)'} alone are rehearsed."


def _of(place: str, recipe: Recipe, root: Path, taken: set[str]) -> list[RehearsedPrompt]:
    """The prompts of nightschool or of a file, in an order by the seed."""
    free = [one for one in rehearsed_prompts(place, recipe.gate.general, root) if wording(one) not in taken]
    return [RehearsedPrompt(free[at], place) for at in np.random.default_rng(recipe.train.seed).permutation(len(free))]


def _taken(recipe: Recipe, home: Home, root: Path, selection: Selection) -> set[str]:
    """The wordings that are taught or asked tonight, or were accepted before."""
    accepted = map(Example.from_json, AcceptedExamples(home.database).shuffled(recipe.name, 0))
    examples = chain(selection.train, selection.new, selection.held_out, accepted, _aside(selection))
    asked = [one.question for one in general_prompts(recipe.gate.general, root)]
    asked += [pin.question for pin in Pins(home.database).ls(recipe.name)]
    return {wording(text) for text in chain(asked, *map(_asked_in, examples))}


def _aside(selection: Selection) -> Iterable[Example]:
    """What is not trained, and yet stands in the night's data."""
    yield from (form.example for form in selection.forms)
    for contradiction in selection.contradictions:
        yield from contradiction.examples


def _asked_in(example: Example) -> list[str]:
    return [*(turn.content for turn in example.messages if turn.role == "user"), *example.paraphrases]


def _in_turn(lists: Sequence[Sequence[RehearsedPrompt]]) -> Iterable[RehearsedPrompt]:
    return (prompt for turn in zip_longest(*lists) for prompt in turn if prompt is not None)
