"""One run, one process: `python -m nightschool.training.run --home H --run RUN_ID [--resume CHECKPOINT|latest]`.

Reads runs/<id>/recipe.yaml, trains, publishes a candidate, and says in status.json how it ended. Log lines go to
stdout as plain text, errors to stderr. The exit code is 0, 75 after a signal (resumable), 130 after a second one,
or that of the error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Damaged, Interrupted, ModelError, NightschoolError, UsageError
from nightschool.models.cost import count_parameters
from nightschool.store import checkpoints, uploads
from nightschool.store.atomic import write_json
from nightschool.store.checkpoints import Checkpoint, checkpoint_path
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from nightschool.store.versions import VersionFacts
from nightschool.training import checkpoint, rng
from nightschool.training.checkpoint import Surroundings
from nightschool.training.classroom import Classroom
from nightschool.training.loop import fit
from nightschool.training.metrics import MetricsLog
from nightschool.training.plan import plan_of, render_plan
from nightschool.training.preparing import prepare
from nightschool.training.pretraining import PretrainClassroom
from nightschool.training.publish import publish_candidate
from nightschool.training.ranks import follow, started_ranks, wants_shards
from nightschool.training.saving import Saver, open_saver
from nightschool.training.signals import StopRequest, stop_on_signals
from nightschool.training.state import TrainState
from nightschool.training.surroundings import describe_environment, surroundings_of
from nightschool.training.world import ALONE, World, is_about_others, joined_world
from nightschool.units import format_seconds

STATUS_SECONDS = 2.0
LINE_SECONDS = 1.0


def say(text: str) -> None:
    """Write one line of the log."""
    print(text, flush=True)  # noqa: T201 - stdout is the log of the run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.training.run", description="Train one run.")
    parser.add_argument("--home", type=Path, required=True, help="the home that holds the run")
    parser.add_argument("--run", help="the id of the run; a process other than the first hears it from that one")
    parser.add_argument("--resume", help="the name of a checkpoint, or `latest`")
    parser.add_argument("--root", type=Path, default=Path(), help="where relative paths of the recipe begin")
    given = parser.parse_args(arguments)
    with stop_on_signals() as stop:
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
                return _guarded(home, run, given.resume, root, stop, world)
        except NightschoolError as error:
            return _complain(error, error.exit_code)


def _follow(home: Home, root: Path, stop: StopRequest) -> int:
    """Be one of the other processes of whatever run process 0 names."""
    with joined_world() as world:
        if world.is_first:
            raise UsageError(
                "There is no --run, and no other process that could name it. Write nightschool train RECIPE."
            )
        try:
            follow(home, RunStore(home).get(world.from_first("")), world=world, root=root, stop=stop)
        except RuntimeError as error:
            if not is_about_others(error):
                raise
            return _complain(error, 1)
    return 0


def _wanted_processes(run: Run) -> int:
    """How many processes this one shall start with itself: those of the recipe, unless somebody started them already."""
    return 1 if "WORLD_SIZE" in os.environ else Recipe.model_validate(run.recipe()).train.num_processes


def _guarded(home: Home, run: Run, resume: str | None, root: Path, stop: StopRequest, world: World = ALONE) -> int:
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
    print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
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


def execute(home: Home, run: Run, *, resume: str | None, root: Path, stop: StopRequest, world: World = ALONE) -> None:
    """Train the run and publish its candidate; in process 0 of `world`, while the others `follow`.

    Raises:
        Interrupted: After a signal; the state was saved if a step was done.
        NightschoolError: For everything that the user can do something about.
    """
    recipe = Recipe.model_validate(run.recipe())
    # The writer is started before a GPU is touched; that of an earlier process of this run is waited for.
    with open_saver(run, recipe.checkpoints, say) as saver:
        point = _checkpoint_to_resume(run, resume)
        world.from_first((resume is not None, point.name if point else ""))
        run.update_status(state="running", pid=os.getpid(), error=None, exit_code=None)
        say(f"Run {run.id}: preparing {recipe.base} by method {recipe.method}")

        classroom = prepare(home, run, recipe, root=root, resuming=resume is not None, point=point, world=world)
        write_json(run.path / "environment.json", describe_environment(classroom))
        plan = plan_of(classroom, home)
        write_json(run.path / "plan.json", plan.to_json())
        # stdout is a file. FORCE_COLOR, which rich honours, says that somebody follows it on a terminal.
        render_plan(plan, Console(file=sys.stdout, width=120, highlight=False))
        sys.stdout.flush()

        surroundings = surroundings_of(classroom, run.recipe_path.read_text(encoding="utf-8"))
        state = _train(run, classroom, surroundings, point, stop, saver, world)
    if classroom.task.is_sharded:
        classroom = _whole_again(home, run, recipe, root)
    _publish(home, run, classroom, state)


def _whole_again(home: Home, run: Run, recipe: Recipe, root: Path) -> Classroom:
    """The whole model with the weights of the last checkpoint, in this process alone."""
    classroom = prepare(home, run, recipe, root=root, resuming=True, point=None)
    checkpoint.load_weights(checkpoints.ls(run)[-1].path, classroom.task)
    return classroom


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


def _more(row: dict[str, Any]) -> str:
    """What only pretraining measures."""
    parts = []
    if "bits_per_byte" in row:
        parts.append(f"{row.get('heldout_bits_per_byte', row['bits_per_byte']):.3f} bits/byte")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if "eta_seconds" in row:
        parts.append(f"{format_seconds(round(row['eta_seconds']))} left")
    return "".join(f" {part}" for part in parts)


@dataclass
class _Progress:
    """Says in the log and in the status how far the run is, neither too often."""

    run: Run
    steps_total: int
    line_at: float = 0.0
    status_at: float = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        moment = time.monotonic()
        last = row["step"] == self.steps_total
        if last or "heldout_loss" in row or moment - self.line_at >= LINE_SECONDS:
            self.line_at = moment
            heldout = f" held-out {row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
            say(
                f"step {row['step']}/{self.steps_total} epoch {row['epoch']} loss {row['loss']:.4f}{heldout} "
                f"lr {row['learning_rate']:.3g} {row['tokens_per_second']:,.0f} tokens trained/s{_more(row)}"
            )
        if last or moment - self.status_at >= STATUS_SECONDS:
            self.status_at = moment
            self.run.update_status(step=row["step"], steps_total=self.steps_total)


def _train(
    run: Run,
    classroom: Classroom,
    surroundings: Surroundings,
    point: Checkpoint | None,
    stop: StopRequest,
    saver: Saver,
    world: World,
) -> TrainState:
    task, budget = classroom.task, classroom.budget
    state = TrainState(task.fingerprint)
    if wants_shards(classroom.recipe, world):
        task.shard(classroom.recipe.train.zero_stage)
    if point is not None:
        state = checkpoint.load(point.path, task, surroundings, classroom.schedule, classroom.scaler, world)
        say(f"Resumed from {point.name}: step {state.step} of {budget.steps_total}")
    run.update_status(step=state.step, steps_total=budget.steps_total)
    run.events.write("training", step=state.step, steps_total=budget.steps_total, resumed_from=point and point.name)

    def save(now: TrainState) -> None:
        say(f"Saving checkpoint at step {now.step}")
        target = checkpoint_path(run, now.epoch, now.step, surroundings.files_processed)
        run.update_status(step=now.step)
        rngs = world.gathered(rng.capture())
        whole = checkpoint.state_to_save(task, now, surroundings, classroom.schedule, classroom.scaler, rngs)
        saver.save(target, whole, last=now.step >= budget.steps_total)

    every = budget.save_every
    if every is None or every.unit != "steps" or every.amount < budget.steps_total:
        saver.expect(checkpoint.expected_bytes(task))
    heldout = classroom.evaluate

    def evaluate() -> float:
        assert heldout is not None
        loss, tokens = heldout()
        run.events.write("heldout", step=state.step, heldout_loss=loss, tokens=tokens)
        if isinstance(classroom, PretrainClassroom) and (sample := classroom.sample()) is not None:
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
            schedule=classroom.schedule,
            metrics=metrics,
            evaluate=evaluate if heldout is not None else None,
            save=save,
            stop=stop,
            scaler=classroom.scaler,
            on_row=_Progress(run, budget.steps_total),
            describe=classroom.figures(state) if isinstance(classroom, PretrainClassroom) else None,
            world=world,
        )
    finally:
        metrics.close()


def _publish(home: Home, run: Run, classroom: Classroom, state: TrainState) -> None:
    """Publish the weights with the lowest held-out loss of this run: the last ones, or those of a checkpoint."""
    recipe, loaded, task = classroom.recipe, classroom.loaded, classroom.task
    step, heldout = _take_best(run, classroom, state)
    task.optimizer.release()
    task.model.eval()
    count = count_parameters(task.model)
    facts = VersionFacts(
        kind="adapter" if loaded.adapter else "model",
        method=recipe.method,
        base=loaded.base_ref if loaded.adapter else recipe.base,
        parent=loaded.ref if _is_version(home, recipe.base) else None,
        run_id=run.id,
        recipe_digest=hashlib.sha256(json.dumps(recipe.as_plain(), sort_keys=True).encode()).hexdigest(),
        data_fingerprint=task.fingerprint,
        num_parameters=count.total,
        dtype=str(next(iter(task.trainable().values())).dtype).removeprefix("torch."),
        context_tokens=loaded.context_tokens,
        heldout_loss=heldout,
    )
    say(f"Publishing step {step} as a candidate of {recipe.name}")
    version, difference = publish_candidate(Registry(home), recipe.name, loaded, classroom.examples, facts)
    run.events.write("published", candidate=version.ref, step=step, logits_difference=difference)
    run.update_status(state="completed", candidate=version.ref, step=state.step, exit_code=0)
    say(f"Published {version.ref}: loaded again, its logits differ by {difference:.1e} from the trained model's")


def _take_best(run: Run, classroom: Classroom, state: TrainState) -> tuple[int, float | None]:
    """Leave the best weights of the run in the model; return their step and held-out loss."""
    last = state.heldout_loss
    if last is None:
        return state.step, None
    saved = [(loss, point) for point in checkpoints.ls(run) if (loss := point.heldout_loss()) is not None]
    best = min(saved, key=lambda pair: (pair[0], -pair[1].step), default=None)
    if best is None or best[0] >= last:
        return state.step, last
    loss, point = best
    say(f"The held-out loss was lowest at step {point.step}: {loss:.4f}, against {last:.4f} at the end")
    checkpoint.load_weights(point.path, classroom.task)
    return point.step, loss


def _is_version(home: Home, base: str) -> bool:
    """Whether the base is one of the registry."""
    return "@" in base or ("/" not in base and base in Registry(home).names())


if __name__ == "__main__":
    sys.exit(main())
