"""What is studied again beside what is new: facts that were accepted before, in one wording and another, and general conversations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, corrected_answers
from nightschool.data.sources.load import load_files
from nightschool.data.study.forms import Form
from nightschool.feedback.replay_pool import AcceptedExamples


class Reader(Protocol):
    """What a method learns of an example, as `DataPlan` has it."""

    @property
    def learns(self) -> Callable[[Example], Example | None]: ...

    def read(self, examples: Iterable[Example]) -> tuple[list[Example], int]: ...


def replayed_and_general(
    recipe: Recipe,
    plan: Reader,
    accepted: AcceptedExamples,
    root: Path,
    *,
    new: Sequence[Example],
    num_trained: int,
    held_out: Sequence[Example],
    held: Collection[str],
    forms_of: Callable[[Sequence[Example]], Sequence[Form]],
) -> tuple[list[Example], list[Example]]:
    """A sample of what was accepted before, the same for the same seed and pool, and all of `replay.path`.

    What a new example answers otherwise is no longer true, and is left out; so is the very sentence that a person
    corrected, in whatever wording it was asked for. What was accepted goes before what the file says.

    Args:
        recipe: Whose `replay` it is.
        plan: What the method learns of an example.
        accepted: The pool.
        root: Where relative paths begin.
        new: What is new tonight.
        num_trained: What is new, with its forms: `replay.ratio` is a share of it.
        held_out: What is never trained.
        held: Digests of what memories hold in place of the weights.
        forms_of: Makes forms of what is replayed; none where nothing is studied in forms.

    Raises:
        NotFound, DataError: If `replay.path` cannot be read.
    """
    wanted = max(recipe.replay.minimum, round(recipe.replay.ratio * num_trained)) if recipe.replay.ratio > 0 else 0
    if wanted == 0 and recipe.replay.path is None:
        return [], []
    taken = {example.digest for example in [*new, *held_out]}
    answered = {example.context for example in new} - {None}
    wrong = corrected_answers(new)

    def is_free(example: Example) -> bool:
        is_wrong = example.answer is not None and example.answer.strip() in wrong
        return not (example.digest in taken or example.context in answered or is_wrong)

    accepted_before = map(Example.from_json, accepted.shuffled(recipe.name, recipe.train.seed, but=held))
    pool = [learned for example in accepted_before if (learned := plan.learns(example)) is not None]
    free = list(filter(is_free, pool))
    replayed = _in_turn(free, forms_of(free[:wanted]), wanted)
    if recipe.replay.path is None:
        return replayed, []
    answered |= {example.context for example in pool} - {None}
    taken |= {example.digest for example in pool}
    return replayed, list(filter(is_free, plan.read(load_files(recipe.replay.path, root, "replay.path"))[0]))


def _in_turn(examples: Sequence[Example], forms: Sequence[Form], wanted: int) -> list[Example]:
    """So many examples, each in one wording before one is there in two; which comes first changes as the pool grows."""
    of: dict[str, list[Example]] = {}
    for form in forms:
        if not form.kept_aside:
            of.setdefault(form.of, []).append(form.example)
    rounds: list[list[Example]] = []
    for example in examples[:wanted]:
        wordings = [example, *of.get(example.digest, ())]
        first = len(examples) % len(wordings)
        for number, one in enumerate([*wordings[first:], *wordings[:first]]):
            rounds += [[]] if number == len(rounds) else []
            rounds[number].append(one)
    return list(islice((one for each in rounds for one in each), wanted))
