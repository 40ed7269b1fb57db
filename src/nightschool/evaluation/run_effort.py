"""The effort of a run, from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nightschool.config.recipe import ADAPTER_METHODS, Recipe
from nightschool.data.study.forms import trained_forms
from nightschool.evaluation.effort import Effort
from nightschool.evaluation.spot_check import Limits, SpotCheck
from nightschool.events import Row, parse_row, read_events
from nightschool.feedback.selection import Selection
from nightschool.feedback.selection_files import read_selection
from nightschool.store.runs import Run

# Methods that train what is new in several forms, and rehearse what a model says to others.
_STUDY = frozenset({"full", "lora", "qlora"})


def effort_of(run: Run) -> Effort:
    """How a run that has ended was trained.

    Raises:
        Damaged: If what it selected was altered.
    """
    recipe = Recipe.model_validate(run.recipe())
    events = {event["event"]: event for event in read_events(run.events_path)}
    selection = read_selection(run.path)
    return Effort(
        checks=tuple(checks_of(_rows(run))),
        step=events.get("published", {}).get("step"),
        steps_total=events.get("training", {}).get("steps_total"),
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate,
        replay_ratio=recipe.replay.ratio,
        wordings=1.0 if selection is None else _wordings(selection),
        rehearsed=0.0 if recipe.rehearse.prompts is None else recipe.rehearse.ratio,
        studies=recipe.method in _STUDY,
        adapter=recipe.method in ADAPTER_METHODS,
        passing="" if recipe.train.early_stopping.every is None else Limits.to_pass(recipe).text,
    )


def checks_of(rows: Iterable[Row]) -> Iterator[SpotCheck]:
    """The spot checks among rows of metrics."""
    for row in rows:
        if isinstance(row.get("learned"), int | float):
            yield SpotCheck.from_json(row)


def _rows(run: Run) -> Iterator[Row]:
    if run.metrics_path.exists():
        for line in run.metrics_path.read_bytes().splitlines():
            row = parse_row(line)
            if row is not None:
                yield row


def _wordings(selection: Selection) -> float:
    """Questions trained for each new answer, whoever wrote them."""
    asked = {example.question for example in [*selection.new, *trained_forms(selection.forms)] if example.question}
    answers = {example.answer for example in selection.new if example.question}
    return len(asked) / max(1, len(answers))
