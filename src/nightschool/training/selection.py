"""Which examples a run studies: what is new, what is replayed, what is held out. Decided once, then kept with the run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, corrected_answers
from nightschool.data.sources.load import split_held_out
from nightschool.events import read_events
from nightschool.feedback.novelty import novelty_for
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.training_data import load_sources
from nightschool.store.atomic import write_bytes
from nightschool.store.database import open_database
from nightschool.store.home import Home

SHOWN_FIRST = 3
NEW, REPLAYED, HELD_OUT = "new_examples.jsonl", "replayed.jsonl", "heldout.jsonl"


@dataclass(frozen=True)
class Selection:
    """The examples of a run. `num_known` examples were left out: the base has learned them, or they were corrected."""

    new: list[Example]
    replayed: list[Example]
    held_out: list[Example]
    num_known: int = 0
    num_duplicates: int = 0
    formats: dict[str, list[str]] = field(default_factory=dict)

    @property
    def train(self) -> list[Example]:
        """What one epoch is made of: new examples as often as their source says, replayed ones once."""
        return [*(example for example in self.new for _ in range(example.repeat)), *self.replayed]

    @property
    def num_files(self) -> int:
        """How many files the new examples came from."""
        return len({example.source for example in self.new})


def select_examples(recipe: Recipe, home: Home, root: Path) -> Selection:
    """Read the sources, hold some examples out, drop what the base has learned, and add replay.

    What accepted versions have learned is new to a base that is none of them. If nothing is new, everything is studied again: whoever started the run wanted one.

    Raises:
        DataError: If a source cannot be read.
    """
    loaded = load_sources(recipe.data, root=root, home=home, name=recipe.name, base=recipe.base)
    accepted = AcceptedExamples(open_database(home))
    split = split_held_out(loaded.examples, recipe.held_out, root=root, trained=accepted.trained(recipe.name))
    lesson = novelty_for(home, recipe.name, recipe.base, split.train)
    new = lesson.new or lesson.all
    return Selection(
        new=new,
        replayed=_replay(recipe, accepted, new=new, held_out=split.held_out),
        held_out=split.held_out,
        num_known=len(split.train) - len(new),
        num_duplicates=loaded.duplicates,
        formats={report.source: sorted(report.formats) for report in loaded.sources},
    )


def _replay(
    recipe: Recipe, accepted: AcceptedExamples, *, new: list[Example], held_out: list[Example]
) -> list[Example]:
    """Sample what was accepted before; the same for the same seed and pool.

    What a new example answers otherwise is no longer true, and is left out; so is the very sentence that a person
    corrected, in whatever wording it was asked for.
    """
    wanted = max(recipe.replay.minimum, round(recipe.replay.ratio * len(new))) if recipe.replay.ratio > 0 else 0
    if wanted == 0:
        return []
    taken = {example.digest for example in [*new, *held_out]}
    answered = {example.context for example in new} - {None}
    wrong = corrected_answers(new)
    pool = (Example.from_json(row) for row in accepted.shuffled(recipe.name, recipe.train.seed))
    free = (
        example
        for example in pool
        if example.digest not in taken
        and example.context not in answered
        and (example.answer is None or example.answer.strip() not in wrong)
    )
    return list(islice(free, wanted))


def sample_of(whole: Selection, num_examples: int, *, seed: int) -> Selection:
    """About `num_examples` of what is trained, and as large a share of what is held out; all of it where it is less.

    Each list keeps its order and its first examples, and the same seed chooses the same ones.
    """
    share = num_examples / max(1, len(whole.train))
    if share >= 1:
        return whole
    chooser = random.Random(seed)

    def sampled(examples: list[Example]) -> list[Example]:
        wanted = round(share * len(examples))
        first = min(SHOWN_FIRST, wanted)
        chosen = sorted(chooser.sample(range(first, len(examples)), wanted - first))
        return [examples[index] for index in (*range(first), *chosen)]

    return replace(whole, new=sampled(whole.new), replayed=sampled(whole.replayed), held_out=sampled(whole.held_out))


def write_selection(folder: Path, selection: Selection) -> None:
    """Keep the examples beside the run: its resume, the gate and later nights read them from there."""
    for name, examples in ((REPLAYED, selection.replayed), (HELD_OUT, selection.held_out), (NEW, selection.new)):
        write_bytes(folder / name, _lines(examples))


def read_selection(folder: Path) -> Selection | None:
    """Return what `write_selection` wrote, or None if it did not come to its end."""
    if not (folder / NEW).is_file():
        return None
    new, replayed, held_out = (
        [Example.from_json(row) for row in read_events(folder / name)] for name in (NEW, REPLAYED, HELD_OUT)
    )
    return Selection(new, replayed, held_out)


def _lines(examples: Iterable[Example]) -> bytes:
    return b"".join(json.dumps(example.to_json(), ensure_ascii=False).encode() + b"\n" for example in examples)
