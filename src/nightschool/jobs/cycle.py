"""One cycle: new data → run → candidate → gate → the champion moves, or stays.

Nothing here holds a tensor. Training and the gate are processes; what they leave on disk is read. A failure at any
point leaves the champion where it was, and the result says how far the cycle came. What a cycle must remember
between its stages lies in `cycle.json` in the run's folder, so that another process can go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Damaged, Interrupted, NightschoolError, NotFound
from nightschool.events import read_events
from nightschool.feedback.promotion import promote, settle
from nightschool.feedback.skipping import PreviousCycle
from nightschool.jobs.beginning import begin_cycle
from nightschool.jobs.gate_ahead import GateAhead
from nightschool.jobs.launch import INTERRUPTED_EXIT_CODE, CycleContext, run_gate, run_training
from nightschool.jobs.outcome import CycleRecord, CycleResult, Outcome, Trigger
from nightschool.jobs.processes import Killed, how_it_ended, is_trained, wait_for_stranger
from nightschool.store.home import Home
from nightschool.store.locks import lock, taken_over
from nightschool.store.names import CHAMPION, lock_path, split_name
from nightschool.store.outbox import announce
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore


def cycle_lock_path(home: Home, name: str) -> Path:
    return lock_path(home, "cycle", name)


def run_cycle(
    home: Home,
    recipe: Recipe,
    *,
    trigger: Trigger,
    root: Path,
    previous: PreviousCycle | None = None,
    around: CycleContext | None = None,
) -> CycleResult:
    """Do one whole cycle and return how it ended.

    Args:
        home: Where runs and versions live.
        recipe: What is wanted. The run starts from the champion of its name where there is one.
        trigger: Why now. A `manual` cycle is never skipped for lack of new data.
        root: Where relative paths of the recipe begin.
        previous: What the last finished cycle had before it; the same again is skipped.
        around: Who watches and who may stop it.

    Raises:
        Locked: If another process is at a cycle of this name.
        NightschoolError: If the data or the starting weights cannot be read; no run was created.
    """
    around = around or CycleContext()
    with around.stop, lock(cycle_lock_path(home, recipe.name), f"a cycle of {recipe.name}"):
        begun = begin_cycle(home, recipe, trigger=trigger, root=root, previous=previous, around=around)
        return begun if isinstance(begun, CycleResult) else _finish(begun, None, around)


def continue_cycle(
    home: Home,
    run_id: str,
    *,
    resume: str | None = "latest",
    around: CycleContext | None = None,
    held_lock: int | None = None,
) -> CycleResult:
    """Go on with a cycle that was interrupted, from where it stopped: training, gate or promotion.

    `resume` is a checkpoint's name, or `latest`, which is step 0 where no checkpoint was written yet. `held_lock` is
    the descriptor of the cycle's lock, where whoever started this process handed it over.

    Raises:
        NotFound: If there is no such run, or no cycle began it.
        Locked: If another process is at a cycle of this name.
    """
    around = around or CycleContext()
    run = RunStore(home).get(run_id)
    CycleRecord.read(run)  # raises where no cycle began it
    path, what = cycle_lock_path(home, run.name), f"a cycle of {run.name}"
    with around.stop, lock(path, what) if held_lock is None else taken_over(held_lock):
        return _finish(run, resume, around)


def _finish(run: Run, resume: str | None, around: CycleContext) -> CycleResult:
    """Train, examine and decide, as far as that was not done yet."""
    with (around.gate_of or GateAhead)(run, around) as ahead:
        return _go_on(run, resume, replace(around, ahead=ahead))


def _go_on(run: Run, resume: str | None, around: CycleContext) -> CycleResult:
    stage, candidate = "training", None
    try:
        around.stop.check("training began")
        candidate = _candidate(run)
        if candidate is None:
            failure = _train(run, resume, around)
            if failure is not None:
                return failure
            candidate = _candidate(run)
        if candidate is None:
            raise Damaged(f"The run {run.id} ended well but published no version. See nightschool runs logs {run.id}.")
        stage = "promotion"
        if _is_half_promoted(run, candidate):
            return _complete_promotion(run, candidate, around)
        stage = "the gate"
        around.stop.check("the gate began")
        champion = Registry(run.home).champion(run.name)
        report = _examine(run, candidate, champion, around)
        stage = "promotion"
        return _decide(run, candidate, champion, report, around)
    except Interrupted as error:
        return _result(run, "interrupted", str(error))
    except (NightschoolError, OSError) as error:
        detail, reached = f"{stage} failed: {error}", candidate.ref if candidate else None
        return _result(run, "failed", detail, candidate=reached, was_killed=isinstance(error, Killed))


def _result(run: Run, outcome: Outcome, detail: str, **more: Any) -> CycleResult:
    """End a cycle: its outcome is kept with the run, too."""
    champion = Registry(run.home).champion(run.name)
    if outcome in ("interrupted", "failed") and run.status.state == "queued":  # no process was there to say so
        run.update_status(state=outcome, error=detail)
    run.events.write("cycle", outcome=outcome, detail=detail)
    return CycleResult(
        outcome,
        detail,
        run_id=run.id,
        champion=champion.ref if champion else None,
        data_fingerprint=CycleRecord.read(run).data_fingerprint,
        **more,
    )


def _candidate(run: Run) -> Version | None:
    """The version that the run has published, if it still exists."""
    published, registry = run.status.candidate, Registry(run.home)
    if published is None:
        return _unsaid(run)
    try:
        return registry.resolve(published if "@" in published else f"{run.name}@{published}")
    except NotFound:
        return None


def _unsaid(run: Run) -> Version | None:
    """What was published by a process that was killed before it could say so; its run says it now."""
    if is_trained(run):
        return None
    found = next((one for one in Registry(run.home).versions(run.name) if one.facts.run_id == run.id), None)
    if found is not None:
        run.update_status(state="completed", candidate=found.ref, exit_code=0, error=None)
    return found


def _train(run: Run, resume: str | None, around: CycleContext) -> CycleResult | None:
    """Train; None when all went well."""
    train = around.trainer or run_training
    exit_code = None if is_trained(run) else train(run, around, resume=resume)
    if exit_code is None or (exit_code != 0 and is_trained(run)):
        # By the child of a cycle that was killed; it may also have been quicker than ours to take the run.
        around.say(f"{run.id} is being trained by process {run.status.pid} already: waiting for it")
        exit_code = wait_for_stranger(run, around.stop)
    if exit_code == 0:
        return None
    status = run.status
    if exit_code == INTERRUPTED_EXIT_CODE or around.stop.requested:
        detail = f"training was interrupted at step {status.step}; the run {run.id} can be resumed"
        return _result(run, "interrupted", detail)
    detail = f"training failed: {status.error or how_it_ended(exit_code)}"
    code = exit_code if 0 < exit_code < 128 else 1
    return _result(run, "failed", detail, failed_exit_code=code, was_killed=exit_code < 0)


def _examine(run: Run, candidate: Version, champion: Version | None, around: CycleContext) -> dict[str, Any]:
    """Compare the candidate with today's champion and return the gate's report as JSON."""
    if champion is not None and champion.id == candidate.id:
        raise Conflict(f"{candidate.ref} is the champion already. Begin a new cycle to go on from it.")
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        # Its last line is for programs: the report says the same to people.
        if around.on_line is not None and not line.startswith("{"):
            around.on_line(line)

    with around.examining():
        exit_code = run_gate(
            run,
            replace(around, on_line=on_line),
            candidate=candidate.ref,
            champion=champion.ref if champion else None,
        )
    if around.stop.requested:
        raise Interrupted(f"The comparison of {candidate.ref} was interrupted; the run {run.id} can be resumed.")
    if exit_code != 0:
        said = lines[-1] if exit_code > 0 and lines else how_it_ended(exit_code)
        kind = Killed if exit_code < 0 else Damaged
        raise kind(f"{said} ({candidate.ref} stays published; go on with nightschool train --resume {run.id})")
    return Registry(run.home).load_report(run.name, candidate.id)


def _decide(
    run: Run, candidate: Version, compared: Version | None, report: dict[str, Any], around: CycleContext
) -> CycleResult:
    """Move the champion if `serve.promote` and the report let it. The gate `compared` the candidate with that champion."""
    registry, wanted = Registry(run.home), Recipe.model_validate(run.recipe()).serve.promote
    passed = report["decision"] == "promote"
    verdict = f"{candidate.ref} " + ("passed the gate" if passed else f"failed {', '.join(failed_rules(report))}")

    def ended(outcome: Outcome, detail: str) -> CycleResult:
        around.say(f"{outcome.capitalize()}: {detail}")
        return _result(run, outcome, detail, candidate=candidate.ref, report=report)

    if wanted == "if_gate_passes" and not passed:
        data = {"model": run.name, "version": candidate.id, "rules": failed_rules(report)}
        with run.home.database.write() as connection:
            announce(connection, split_name(run.name)[0], "model.refused", data, key=run.id)
        return ended("refused", verdict)
    champion, pinned = registry.champion(run.name), registry.pinned(run.name)
    obstacle = None
    if wanted == "never":
        obstacle = "serve.promote is never"
    elif pinned is not None:
        obstacle = f"the champion is pinned to {pinned.ref}"
    elif champion != compared:
        before, after = (one.ref if one else "none" for one in (compared, champion))
        obstacle = f"the champion moved from {before} to {after} meanwhile"
    if obstacle is not None:
        return ended("published", f"{verdict}; it is not promoted, because {obstacle}")
    promote(run.home, run.name, candidate.id, by=_mover(run))
    return ended("promoted", verdict if passed else f"{verdict}; promoted anyway, because serve.promote is always")


def _mover(run: Run) -> str:
    """Who moves the champion, in the registry's history."""
    return f"cycle {run.id}"


def _is_half_promoted(run: Run, candidate: Version) -> bool:
    """Whether this cycle made its candidate the champion and was then stopped before it had said so."""
    moves = [move for move in Registry(run.home).history(run.name) if move.alias == CHAMPION]
    if not moves or (moves[-1].after, moves[-1].by) != (candidate.id, _mover(run)):
        return False
    return all(row.get("outcome") != "promoted" for row in read_events(run.events_path) if row["event"] == "cycle")


def _complete_promotion(run: Run, candidate: Version, around: CycleContext) -> CycleResult:
    """Do what was left to do after the champion had moved."""
    settle(run.home, run.name)
    report = Registry(run.home).load_report(run.name, candidate.id)
    detail = f"{candidate.ref} was made the champion before the cycle was stopped; the accepted examples follow it now"
    around.say(f"Promoted: {detail}")
    return _result(run, "promoted", detail, candidate=candidate.ref, report=report)


def failed_rules(report: Mapping[str, Any]) -> list[str]:
    """The names of the rules that were not passed, with what each found."""
    return [f"{rule['rule']} ({rule['why']})" for rule in report["rules"] if rule["passed"] is False]
