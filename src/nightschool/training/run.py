"""One run, one process: `python -m nightschool.training.run --home H --run RUN_ID [--resume CHECKPOINT|latest]`.

Reads runs/<id>/recipe.yaml, trains, publishes a candidate, and says in status.json how it ended. Log lines go to
stdout as plain text, errors to stderr. The exit code is 0, 75 after a signal (resumable), 130 after a second one,
or that of the error.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from nightschool import uploads
from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Damaged, Interrupted, ModelError, NightschoolError, UsageError
from nightschool.store import checkpoints
from nightschool.store.atomic import write_json
from nightschool.store.checkpoints import Checkpoint, checkpoint_path
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import Run, RunStore
from nightschool.training.allocator import keep_freed_memory
from nightschool.training.candidate import publish
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.checkpoint.full_state import CheckpointContext
from nightschool.training.checkpoint.saver import Saver, open_saver
from nightschool.training.distributed.launcher import (
    follow,
    more_saves_than_one,
    saving_ranks,
    started_ranks,
    wants_shards,
)
from nightschool.training.distributed.world import ALONE, World, is_about_others, joined_world
from nightschool.training.environment import checkpoint_context, describe_environment
from nightschool.training.loop import fit
from nightschool.training.methods.pretrain import PreparedPretrain
from nightschool.training.metrics import MetricsLog
from nightschool.training.planning.plan import plan_of, render_plan
from nightschool.training.prepare import prepare
from nightschool.training.progress import Progress, say
from nightschool.training.setup import PreparedRun
from nightschool.training.state import TrainState
from nightschool.units import printable
from nightschool.work.stop import Stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.training.run", description="Train one run.")
    parser.add_argument("--home", type=Path, required=True, help="the home that holds the run")
    parser.add_argument("--run", help="the id of the run; a process other than the first hears it from that one")
    parser.add_argument("--resume", help="the name of a checkpoint, or `latest`")
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
                code = _guarded(home, run, given.resume, root, stop, world)
                if code in (0, Interrupted.exit_code):
                    world.wait()
                return code
        except NightschoolError as error:
            return _complain(error, error.exit_code)


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
                follow(home, RunStore(home).get(world.from_first("")), world=world, root=root, stop=stop)
            except Interrupted as error:
                code = _complain(error, error.exit_code)
            # Whoever started us may end the others as soon as one is gone, and process 0 is still at work.
            world.wait()
        except RuntimeError as error:
            if not is_about_others(error):
                raise
            return _complain(error, 1)
    return code


def _wanted_processes(run: Run) -> int:
    """How many processes this one shall start with itself: those of the recipe, unless somebody started them already."""
    return 1 if "WORLD_SIZE" in os.environ else Recipe.model_validate(run.recipe()).train.num_processes


def _guarded(home: Home, run: Run, resume: str | None, root: Path, stop: Stop, world: World = ALONE) -> int:
    """Run it, and write into the status how it ended, whatever happens."""
    try:
        with lock(run.lock_path, f"the run {run.id}"):
            published = run.status.candidate
            if published is not None:
                raise Conflict(f"The run {run.id} has published {published} already. Start a new run.")
            try:
                execute(home, run, resume=resume, root=root, stop=stop, world=world)
            except Interrupted as error:
                run.update_status(state="interrupted", error=str(error), exit_code=error.exit_code)
                uploads.wait_at_stop(home, run, say=lambda text: print(text, flush=True))  # noqa: T201
                return _complain(error, error.exit_code)
            except Exception as error:
                error = _explained(error)
                code = error.exit_code if isinstance(error, NightschoolError) else 1
                _note_failure(run, error, code)
                if not isinstance(error, NightschoolError):
                    traceback.print_exception(error)
                return _complain(error, code)
    except NightschoolError as error:
        return _complain(error, error.exit_code)
    return 0


def _note_failure(run: Run, error: Exception, code: int) -> None:
    """Write the failure into the status; on a full disk even that can fail, and the error itself matters more."""
    try:
        run.update_status(state="failed", error=str(error), exit_code=code)
        run.events.write("failed", error=str(error), exit_code=code)
    except (NightschoolError, OSError) as second:
        _complain(second, code)


def _complain(error: Exception, code: int) -> int:
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
    return code


def _explained(error: Exception) -> Exception:
    """Put what users can do about it into an error of a library."""
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(
            f"The GPU has no more room: {error} Lower train.batch_size and raise train.accumulation_steps, "
            "or write train.gradient_checkpointing=true."
        )
    if isinstance(error, RuntimeError) and is_about_others(error):
        return NightschoolError(
            f"Another process of this run is gone, so it cannot go on: {str(error).splitlines()[0]} "
            "See log-rank1.txt and so on in the run's folder; go on with --resume latest."
        )
    return error


def execute(home: Home, run: Run, *, resume: str | None, root: Path, stop: Stop, world: World = ALONE) -> None:
    """Train the run and publish its candidate; in process 0 of `world`, while the others `follow`.

    Raises:
        Interrupted: After a signal; the state was saved if a step was done.
        NightschoolError: For everything that the user can do something about.
    """
    recipe = Recipe.model_validate(run.recipe())
    # The writer is started before a GPU is touched; that of an earlier process of this run is waited for.
    ranks = saving_ranks(recipe, world)
    with open_saver(run, recipe.checkpoints, say, ranks=ranks, stop=lambda: stop.reason is not None) as saver:
        point = _checkpoint_to_resume(run, resume)
        world.from_first((point.name if point else "", saver.attempt))
        run.update_status(state="running", pid=os.getpid(), error=None, exit_code=None)
        say(f"Run {run.id}: preparing {recipe.base} by method {recipe.method}")

        prepared = prepare(home, run, recipe, root=root, point=point, world=world)
        keep_freed_memory(recipe)  # from here on; what loading took for a moment is given back
        write_json(run.path / "environment.json", describe_environment(prepared))
        plan = plan_of(prepared, home)
        write_json(run.path / "plan.json", plan.to_json())
        # stdout is a file. FORCE_COLOR, which rich honours, says that somebody follows it on a terminal.
        render_plan(plan, Console(file=sys.stdout, width=120, highlight=False))
        sys.stdout.flush()

        context = checkpoint_context(prepared, run.recipe_path.read_text(encoding="utf-8"))
        state = _train(run, prepared, context, point, stop, saver, world)
    if prepared.task.is_sharded:
        prepared = _whole_again(home, run, recipe, root, state.step)
    publish(home, run, prepared, state)


def _whole_again(home: Home, run: Run, recipe: Recipe, root: Path, step: int) -> PreparedRun:
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
    prepared = prepare(home, run, recipe, root=root, point=last)
    full_state.load_weights(last.path, prepared.task)
    return prepared


def _checkpoint_to_resume(run: Run, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `--resume` means; None to begin at step 0.

    Raises:
        NotFound: If there is no checkpoint of that name.
        Conflict: If the run would begin at step 0 beside checkpoints of an earlier attempt.
        Damaged: If none is whole.
    """
    if resume is None:
        there = checkpoints.ls(run)
        if there:
            raise Conflict(
                f"The run {run.id} has {len(there)} checkpoints, the newest of step {there[-1].step}. "
                "Go on from it with --resume latest, or start a new run."
            )
        return None
    if resume != "latest":
        return checkpoints.get(run, resume)
    newest = checkpoints.newest_whole(run)
    for skipped in newest.skipped:
        say(f"Skipping {skipped.checkpoint.name}: {skipped.why}")
    if newest.checkpoint is None and newest.skipped:
        raise Damaged(
            f"None of the {len(newest.skipped)} checkpoints of {run.id} is whole. Start a new run, or restore one."
        )
    if newest.checkpoint is None:
        say("There is no checkpoint yet: beginning at step 0")
    return newest.checkpoint


def _train(
    run: Run,
    prepared: PreparedRun,
    context: CheckpointContext,
    point: Checkpoint | None,
    stop: Stop,
    saver: Saver,
    world: World,
) -> TrainState:
    task, budget = prepared.task, prepared.budget
    state = TrainState(task.fingerprint)
    if wants_shards(prepared.recipe, world):
        task.shard(prepared.recipe.train.zero_stage)
    if point is not None:
        state = full_state.load(point.path, task, context, prepared.schedule, prepared.scaler, world)
        say(f"Resumed from {point.name}: step {state.step} of {budget.steps_total}")
    run.update_status(step=state.step, steps_total=budget.steps_total)
    run.events.write("training", step=state.step, steps_total=budget.steps_total, resumed_from=point and point.name)

    def save(now: TrainState) -> None:
        say(f"Saving checkpoint at step {now.step}")
        target = checkpoint_path(run, now.epoch, now.step, context.files_processed)
        run.update_status(step=now.step)
        rngs = world.gathered(rng.capture())
        whole = full_state.state_to_save(task, now, context, prepared.schedule, prepared.scaler, rngs)
        saver.save(target, whole, last=now.step >= budget.steps_total)

    if more_saves_than_one(budget):
        saver.expect(task.expected_bytes())
    heldout = prepared.evaluate

    def evaluate() -> float:
        assert heldout is not None
        loss, tokens = heldout()
        run.events.write("heldout", step=state.step, heldout_loss=loss, tokens=tokens)
        if isinstance(prepared, PreparedPretrain) and (sample := prepared.sample()) is not None:
            run.events.write("sample", step=state.step, prompt=sample[0], continuation=sample[1])
            say(f"sample: {sample[0]!r} … {sample[1]!r}")
        if state.step == 0:
            say(f"held-out loss before training {loss:.4f} over {tokens} tokens")
        return loss

    metrics = MetricsLog(run.metrics_path, run.path / "tensorboard", resumed_step=state.step)
    try:
        return fit(
            task,
            state,
            budget,
            schedule=prepared.schedule,
            metrics=metrics,
            evaluate=evaluate if heldout is not None else None,
            save=save,
            stop=stop,
            scaler=prepared.scaler,
            on_row=Progress(run, budget.steps_total),
            describe=prepared.figures(state) if isinstance(prepared, PreparedPretrain) else None,
            world=world,
        )
    finally:
        metrics.close()


if __name__ == "__main__":
    sys.exit(main())
