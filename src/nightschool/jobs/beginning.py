"""Where a cycle begins: is there something to study, and what, and from which weights."""

from __future__ import annotations

from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Locked
from nightschool.evaluation.general import general_prompts
from nightschool.feedback.adopted_facts import said_of_held
from nightschool.feedback.contradictions import notes_on, what_to_do
from nightschool.feedback.promotion import settle
from nightschool.feedback.selection import Selection, select
from nightschool.feedback.selection_files import write_selection
from nightschool.feedback.skipping import PreviousCycle, fingerprint_of, nothing_to_train, reason_to_skip
from nightschool.feedback.tonight import said_of_waiting
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.outcome import CycleRecord, CycleResult, Trigger
from nightschool.jobs.starting_weights import starting_weights
from nightschool.memory.adopted import in_memories
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore


def begin_cycle(
    home: Home,
    recipe: Recipe,
    *,
    trigger: Trigger,
    root: Path,
    previous: PreviousCycle | None = None,
    around: CycleContext | None = None,
) -> Run | CycleResult:
    """Decide whether there is something to study and create the run; trains nothing. The caller holds the lock."""
    around = around or CycleContext()
    name = recipe.name
    _refuse_beside_another(home, name)
    champion = Registry(home).champion(name)
    if champion is not None:
        settle(home, name)  # what an earlier cycle may have been killed before
    general_prompts(recipe.gate.general, root)  # what the gate could not read is said before a night is spent
    base = starting_weights(home, recipe, say=around.say)
    wanted = recipe.begun_with(base)
    selection = select(wanted, home, root, in_memories(home, name))
    fingerprint = fingerprint_of(wanted, selection)
    around.stop.check("the run was created")
    reason = nothing_to_train(selection)
    if reason is None and trigger != "manual" and recipe.schedule.min_new_examples > 0:
        reason = reason_to_skip(recipe, selection, fingerprint, previous)
    if reason is not None:
        _say_contradictions(selection, name, around)
        around.say(f"Skipped: {reason}")
        return CycleResult("skipped", reason, champion=champion.ref if champion else None, data_fingerprint=fingerprint)
    run = RunStore(home).create(wanted.as_plain(), name=name)
    write_selection(run.path, selection)
    CycleRecord(
        trigger=trigger,
        root=str(root.resolve()),
        recipe_base=recipe.base,
        recipe_shape=recipe.shape.given(),
        champion=champion.ref if champion else None,
        data_fingerprint=fingerprint,
        num_new_examples=selection.num_new,
    ).write(run)
    data = "token shards" if selection.shards else f"{selection.num_new} new of {selection.num_all} examples"
    around.say(f"Run {run.id}: {data}, starting from {base}")
    if selection.num_held:
        run.events.write("facts_held", by_memories=selection.num_held)
        around.say(said_of_held(selection.num_held))
    if selection.num_waiting:
        run.events.write("facts_waiting", waiting=selection.num_waiting, facts_per_night=wanted.study.facts_per_night)
        around.say(said_of_waiting(selection.num_waiting, wanted.study.facts_per_night))
    if selection.contradictions:  # by their places: no text is left in the events
        run.events.write("contradictions", questions=[one.places for one in selection.contradictions])
        _say_contradictions(selection, name, around)
    return run


def _say_contradictions(selection: Selection, name: str, around: CycleContext) -> None:
    for line in [*notes_on(selection.contradictions), what_to_do(selection.contradictions, name)]:
        if line:
            around.say(line)


def _refuse_beside_another(home: Home, name: str) -> None:
    """A run whose cycle was killed may train on by itself, and two at once would not see each other's results."""
    for run in RunStore(home).ls():
        if run.name == name and not run.status.is_final and (process := run.status.find_process()) is not None:
            raise Locked(
                f"The run {run.id} is still being trained by process {process.pid}. Wait for it, "
                f"or end it with nightschool runs stop {run.id}."
            )
