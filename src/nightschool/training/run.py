"""One run, one process: `python -m nightschool.training.run --home H --run RUN_ID [--resume CHECKPOINT|latest]`.

Reads runs/<id>/recipe.yaml, trains, publishes a candidate, and says in status.json how it ended. Log lines go to
stdout as plain text, errors to stderr. The exit code is 0, 75 after a signal (resumable), 130 after a second one,
or that of the error. With `--steps N` it saves after N steps and ends with 0: what a check of resuming compares.

    run       here: where a run begins, what it writes down, how it ends; `execute` is the same in all its processes
    method    methods/: what a recipe means, as a `PreparedRun`
    task      task.py: what learns, with the two verbs of a step
    loop      loop.py: the one training loop
    checkpoint    checkpoint/full_state.py: what is saved, and how it comes back
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from nightschool import uploads
from nightschool.config.recipe import Recipe
from nightschool.data.batches import Batch
from nightschool.errors import Conflict, Damaged, Interrupted, ModelError, NightschoolError, UsageError
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.models.load import LoadedModel
from nightschool.store import checkpoints
from nightschool.store.atomic import write_json
from nightschool.store.candidate_files import CandidateFiles
from nightschool.store.checkpoints import Checkpoint, Reason, checkpoint_path
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import Run, RunStore
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.checkpoint.saver import Ranks, Saver, open_saver
from nightschool.training.distributed.last_words import CapturedRandomState, any_failed
from nightschool.training.distributed.world import ALONE, World, is_about_others, joined_world, started_ranks
from nightschool.training.environment import Rerun, describe_environment, keep_freed_memory
from nightschool.training.loop import fit
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import PreparedRun, Setup
from nightschool.training.metrics import MetricsLog, Progress, say
from nightschool.training.planning.plan import plan_of, render_plan, saves_in_background, say_measured
from nightschool.training.publish import publish
from nightschool.training.state import Budget, TrainState
from nightschool.training.task import Task
from nightschool.units import printable
from nightschool.work.processes import live
from nightschool.work.stop import Stop

# So long the last words of another process are waited for that is gone.
_WORDS_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.training.run", description="Train one run.")
    parser.add_argument("--home", type=Path, required=True, help="the home that holds the run")
    parser.add_argument("--run", help="the id of the run; a process other than the first hears it from that one")
    parser.add_argument("--resume", help="the name of a checkpoint, or `latest`")
    parser.add_argument("--steps", type=int, help="save after so many steps, and end before the run does")
    parser.add_argument("--root", type=Path, default=Path(), help="where relative paths of the recipe begin")
    given = parser.parse_args(arguments)
    with Stop() as stop:
        try:
            home, root = Home(given.home.absolute()), given.root.absolute()
            if given.run is None or int(os.environ.get("RANK", "0")) > 0:
                return _follow(home, root, stop)
            run = RunStore(home).get(given.run)
            with (
                started_ranks(home, run, root, _wanted_processes(run)) as environment,
                joined_world(environment) as world,
            ):
                world.from_first(run.id)
                code = guarded(home, run, given.resume, root, stop, world, steps=given.steps)
                if code in (0, Interrupted.exit_code):
                    world.wait()
        except NightschoolError as error:
            return complain(error, error.exit_code)
        if given.steps is None or stop.requested:
            return code
        if code == 0:
            return complain(UsageError("The run came to its end. Give fewer --steps."), 1)
        return 0 if code == Interrupted.exit_code else code


def _follow(home: Home, root: Path, stop: Stop) -> int:
    """Be one of the other processes of whatever run process 0 names."""
    with joined_world() as world:
        if world.is_first:
            raise UsageError(
                "There is no --run, and no other process that could name it. Write nightschool train RECIPE."
            )
        try:
            code = 0
            try:
                execute(home, RunStore(home).get(world.from_first("")), resume=None, root=root, stop=stop, world=world)
            except Interrupted as error:
                code = complain(error, error.exit_code)
            # Whoever started us may end the others as soon as one is gone, and process 0 is still at work.
            world.wait()
        except RuntimeError as error:
            if not is_about_others(error):
                raise
            return complain(_about_another(error, world), 1)
    return code


def _wanted_processes(run: Run) -> int:
    """How many processes this one shall start with itself: those of the recipe, unless somebody started them already."""
    return 1 if "WORLD_SIZE" in os.environ else Recipe.model_validate(run.recipe()).train.num_processes


def guarded(
    home: Home,
    run: Run,
    resume: str | None,
    root: Path,
    stop: Stop,
    world: World = ALONE,
    *,
    steps: int | None = None,
    company: Company | None = None,
) -> int:
    """Run it, and write into the status how it ended, whatever happens; return the exit code."""
    try:
        with lock(run.lock_path, f"the run {run.id}"):
            published = run.status.candidate
            if published is not None:
                raise Conflict(f"The run {run.id} has published {published} already. Start a new run.")
            try:
                execute(home, run, resume=resume, root=root, stop=stop, world=world, steps=steps, company=company)
            except Interrupted as error:
                run.update_status(state="interrupted", error=str(error), exit_code=error.exit_code)
                uploads.wait_at_stop(run, say=lambda text: print(printable(text), flush=True))  # noqa: T201
                return complain(error, error.exit_code)
            except Exception as error:
                error = _explained(error, world)
                code = error.exit_code if isinstance(error, NightschoolError) else 1
                _note_failure(run, error, code)
                if not isinstance(error, NightschoolError):
                    traceback.print_exception(error)
                return complain(error, code)
    except NightschoolError as error:
        return complain(error, error.exit_code)
    return 0


def _note_failure(run: Run, error: Exception, code: int) -> None:
    """Write the failure into the status; on a full disk even that can fail, and the error itself matters more."""
    try:
        run.update_status(state="failed", error=str(error), exit_code=code)
        run.events.write("failed", error=str(error), exit_code=code)
    except (NightschoolError, OSError) as second:
        complain(second, code)


def complain(error: Exception, code: int) -> int:
    """Say what went wrong, and return the exit code."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
    return code


def _explained(error: Exception, world: World) -> Exception:
    """Put what users can do about it into an error of a library."""
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(
            f"The GPU has no more room: {error} Lower train.batch_size and raise train.accumulation_steps, "
            "or write train.gradient_checkpointing=true."
        )
    if isinstance(error, RuntimeError) and is_about_others(error):
        return _about_another(error, world)
    return error


def _about_another(error: RuntimeError, world: World) -> NightschoolError:
    """Which process is gone, and what it said of it."""
    words = {} if world.board is None else world.board.read(_WORDS_SECONDS, any_failed)
    failed = next((one for one in words.values() if one.error), None)
    silent = [str(rank) for rank in range(world.size) if rank not in words]
    if failed is not None:
        what = f"Process {failed.rank} of this run ended by {failed.error.rstrip('.')}, so no other can go on."
    elif len(silent) == 1:
        what = f"Process {silent[0]} of this run is gone without a word, so no other can go on."
    else:
        what = f"Another process of this run is gone, so it cannot go on: {str(error).splitlines()[0]}"
    return NightschoolError(
        f"{what} See what it wrote (log-rank1.txt and so on in the run's folder, or what torchrun "
        "printed), and go on with --resume latest."
    )


def execute(
    home: Home,
    run: Run,
    *,
    resume: str | None,
    root: Path,
    stop: Stop,
    world: World = ALONE,
    steps: int | None = None,
    company: Company | None = None,
) -> None:
    """Train the run and publish its candidate. All processes of `world` call this; the first one decides and writes.

    Args:
        home: Where runs and versions are.
        run: The run.
        resume: The checkpoint to go on from, or `latest`; only the first process needs to know.
        root: Where relative paths of the recipe begin.
        stop: Asked once per step.
        world: The processes that train together.
        steps: Stop after so many, as a signal would.
        company: The other runs that this process trains.

    Raises:
        Interrupted: After a signal, or so many steps; the state was saved if a step was done.
        NightschoolError: For everything that the user can do something about.
        RuntimeError: If another process is gone.
    """
    recipe = Recipe.model_validate(run.recipe())
    with _started(run, recipe, resume, stop, world, company) as start, world.telling():
        if world.is_first:
            shares = company is not None
            CandidateFiles.forget(run)
            run.update_status(state="running", pid=os.getpid(), shares_process=shares, error=None, exit_code=None)
            say(f"Run {run.id}: preparing {recipe.base} by method {recipe.method}")
        prepared = prepare(home, run, root=root, point=start.point, world=world, company=company)
        prepared.begin(run.path)  # what is computed beside the examples is then in the plan's measurements
        keep_freed_memory(recipe)  # from here on; what loading and asking took for a moment is given back
        if world.is_first:
            _describe(home, run, prepared)
        state = _train(run, prepared, start, stop, world, steps, company)
        if world.is_first:
            if start.saver is not None:
                start.saver.finish()
            if prepared.task.is_sharded:
                prepared = _whole_again(home, run, root, state.step)
            publish(home, run, prepared, state)


class Company(Protocol):
    """The other runs of a process, as one of them sees them: see `training.together`."""

    def load_base(self, ref: str, home: Home, **settings: Any) -> LoadedModel:
        """As `models.load.load_base`; weights that another run holds already are not loaded again."""
        ...

    def accumulate(
        self, task: Task, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None
    ) -> Tensor:
        """As `task.accumulate`; in one pass with the other runs, where that can be."""
        ...


@dataclass(frozen=True)
class _Start:
    """Where this process of the run begins. `saver` is None in a process that saves nothing."""

    point: Checkpoint | None
    saver: Saver | None


@contextmanager
def _started(
    run: Run, recipe: Recipe, resume: str | None, stop: Stop, world: World, company: Company | None
) -> Iterator[_Start]:
    """Open the saver, and have the first process choose the checkpoint to go on from; at the end all is written.

    The writer is started before a GPU is touched; that of an earlier process of this run is waited for. Where many runs
    share a process, none has a writer: their checkpoints are small, and their writers together would not be. Nor has one
    whose experts are streamed: it would hold a copy of all of them.
    """
    settings = recipe.checkpoints
    if company is not None or not saves_in_background(recipe):
        settings = settings.model_copy(update={"background": False})
    sharded = _wants_shards(recipe, world)
    ranks = Ranks(world.rank, world.size, num_neighbours=world.local_size - 1) if sharded else Ranks()
    if world.is_first:
        with open_saver(run, settings, say, ranks=ranks, stop=lambda: stop.requested) as saver:
            point = checkpoints.to_resume(run, resume, say)
            world.from_first((point.name if point else "", saver.attempt))
            yield _Start(point, saver)
        return
    name, attempt = world.from_first(("", 0))
    point = checkpoints.get(run, name) if name else None
    if not sharded:
        yield _Start(point, None)
        return
    with open_saver(run, settings, say, ranks=replace(ranks, attempt=attempt)) as saver:
        yield _Start(point, saver)


def _wants_shards(recipe: Recipe, world: World) -> bool:
    """Whether the processes share the parameters among them, and so save each what it has."""
    return recipe.train.zero_stage > 0 and world.size > 1


def prepare(
    home: Home,
    run: Run,
    *,
    root: Path,
    point: Checkpoint | None,
    world: World = ALONE,
    company: Company | None = None,
    resident: bool = False,
) -> PreparedRun[Any]:
    """Everything before step 1, as the recipe's method has it; to go on from `point`, if that is given.

    With `resident`, experts are parameters like all others, wherever the recipe lets them live: for who looks at all of them.
    """
    recipe = Recipe.model_validate(run.recipe())
    if resident:
        recipe = recipe.model_copy(update={"experts": recipe.experts.model_copy(update={"tier": "device"})})
    rerun = Rerun.of(point.path) if point else None
    setup = Setup(recipe, home, root, run.path, rerun, world)
    if company is not None:
        setup = replace(setup, load_base=company.load_base)
    return METHODS[recipe.method].prepare(setup)


def _describe(home: Home, run: Run, prepared: PreparedRun[Any]) -> None:
    """Write down the environment and the plan."""
    task = prepared.task
    environment = describe_environment(
        task.device, prepared.dtype, num_threads=prepared.num_threads, num_processes=task.world.size
    )
    write_json(run.path / "environment.json", environment)
    plan = plan_of(prepared, home)
    write_json(run.path / "plan.json", plan.to_json())
    # stdout is a file. FORCE_COLOR, which rich honours, says that somebody follows it on a terminal.
    render_plan(plan, Console(file=sys.stdout, width=120, highlight=False))
    sys.stdout.flush()


def _train(
    run: Run,
    prepared: PreparedRun[Any],
    start: _Start,
    stop: Stop,
    world: World,
    steps: int | None,
    company: Company | None,
) -> TrainState:
    task, budget, schedule, scaler = prepared.task, prepared.budget, prepared.schedule, prepared.scaler
    context = prepared.checkpoint_context(run.recipe_path.read_text(encoding="utf-8"))
    saver, writes, evaluate_heldout = start.saver, world.is_first, prepared.evaluate
    state = TrainState(task.fingerprint)
    if _wants_shards(prepared.recipe, world):
        task.shard(prepared.recipe.train.zero_stage)
    if start.point is not None:
        state = full_state.load(start.point.path, task, context, schedule, scaler, world)

    def target_of(now: TrainState) -> Path:
        return checkpoint_path(run, now.epoch, now.step, context.files_processed)

    def save(now: TrainState, reason: Reason) -> None:
        write(now, reason, world.gathered(rng.capture()))

    def write(now: TrainState, reason: Reason, rngs: Sequence[CapturedRandomState]) -> None:
        if saver is None:
            return
        contents = full_state.state_to_save(
            task, now, context, schedule, scaler, rngs, world.rank, reason=reason, merit=budget.merit(now)
        )
        if writes:
            say(f"Saving checkpoint at step {now.step}")
            run.update_status(step=now.step)
        saver.save(target_of(now), contents, last=now.step >= budget.steps_total or reason == "emergency")

    def rescue(now: TrainState, rngs: Sequence[CapturedRandomState]) -> None:
        assert saver is not None
        write(now, "emergency", rngs)
        saver.settle()
        # Where the recipe goes on without a checkpoint when the disk is full, nothing else says that there is none.
        checkpoints.get(run, target_of(now).name)

    def evaluate() -> float:
        assert evaluate_heldout is not None
        loss, count = evaluate_heldout()
        if writes:
            run.events.write("heldout", step=state.step, heldout_loss=loss, **{prepared.loss_unit: count})
            if (sample := prepared.sample()) is not None:
                run.events.write("sample", step=state.step, prompt=sample[0], continuation=sample[1])
                say(f"sample: {sample[0]!r} … {sample[1]!r}")
            if state.step == 0:
                say(f"held-out loss before training {loss:.4f} over {count} {prepared.loss_unit}")
        return loss

    def spot_check(step: int) -> SpotCheck:
        assert prepared.spot_check is not None
        check = prepared.spot_check(step)
        if writes:
            run.events.write("spot_check", **check.to_json())
        return check

    if writes:
        if start.point is not None:
            say(f"Resumed from {start.point.name}: step {state.step} of {budget.steps_total}")
        run.update_status(step=state.step, steps_total=budget.steps_total)
        resumed_from = start.point and start.point.name
        run.events.write("training", step=state.step, steps_total=budget.steps_total, resumed_from=resumed_from)
    if saver is not None and budget.saves_before_its_end:
        saver.expect(task.expected_bytes())
    metrics = MetricsLog(run.metrics_path, run.path / "tensorboard", resumed_step=state.step) if writes else None
    first = state.step, state.seconds
    try:
        state = fit(
            task,
            state,
            budget,
            schedule=schedule,
            metrics=metrics,
            evaluate=None if evaluate_heldout is None else evaluate,
            spot_check=None if prepared.spot_check is None else spot_check,
            save=save,
            # Each has only its part of the weights, and all of them would have to save at the same time.
            rescue=None if saver is None or _wants_shards(prepared.recipe, world) else rescue,
            stop=stop,
            last_step=None if steps is None else state.step + steps,
            scaler=scaler,
            on_row=Progress(run, budget.steps_total) if writes else None,
            describe=prepared.figures(state) if writes else None,
            world=world,
            accumulate=None if company is None else company.accumulate,
        )
    finally:
        if metrics is not None:
            metrics.close()
    if writes and company is None and state.step > first[0]:
        say_measured(run, task.device, state.step - first[0], state.seconds - first[1])
    if writes and state.step < budget.steps_total:
        why = _why_ended(budget, state)
        say(f"Ended after step {state.step} of {budget.steps_total}: {why}")
        run.events.write("early_stop", step=state.step, steps_total=budget.steps_total, why=why)
        run.update_status(step=state.step, steps_total=state.step)
    return state


def _why_ended(budget: Budget, state: TrainState) -> str:
    if budget.knows_enough(state):
        return f"it shows enough, {state.spot_checks[-1].text}"
    return "the held-out loss falls no more" if budget.enough is None else "spot checks find nothing better"


def _whole_again(home: Home, run: Run, root: Path, step: int) -> PreparedRun[Any]:
    """The whole model with the weights of the last checkpoint, in this process alone.

    Raises:
        Damaged: If that one was not written.
    """
    last = max(checkpoints.ls(run), key=lambda point: point.step, default=None)
    if last is None or last.step != step:
        raise Damaged(
            f"The checkpoint of step {step} was not written, and a sharded model is published from it. "
            "Make room on the disk, and go on with --resume latest."
        )
    prepared = prepare(home, run, root=root, point=last)
    full_state.load_weights(last.path, prepared.task)
    return prepared


if __name__ == "__main__":
    live(main)
