"""`nightschool train` and `nightschool plan`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nightschool.cli.lookup import find_run_or_checkpoint
from nightschool.cli.output import answer, let_children_colour, note, rendered, session
from nightschool.cli.recipes import read_recipe
from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.jobs.beginning import begin_cycle
from nightschool.jobs.cycle import continue_cycle, cycle_lock_path, run_cycle
from nightschool.jobs.launch import CycleContext, child_environment, start_process
from nightschool.jobs.lengthened import LENGTHS, lengthened
from nightschool.jobs.outcome import CycleRecord, CycleResult
from nightschool.jobs.starting_weights import starting_weights
from nightschool.remotes.address import is_url
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.locks import lock_to_hand_over
from nightschool.store.manifest import read_manifest
from nightschool.store.runs import Run, RunStore
from nightschool.units import printable
from nightschool.uploads import settings_of
from nightschool.uploads.fetch import fetch_checkpoint, refuse_another_in_bucket
from nightschool.views.runs import flatten
from nightschool.work.processes import command


def train(
    recipe: Path | None = None,
    /,
    *overrides: str,
    resume: str | None = None,
    detach: bool = False,
    dry_run: Annotated[bool, Parameter(name=["--dry-run", "-n"])] = False,
    no_background_upload: bool = False,
) -> int:
    """Train, publish a candidate, examine it, and promote it if the gate passes.

    The run starts from the champion of the recipe's name where there is one, else from its base. Exits 0 when the
    candidate was promoted (or published, where serve.promote says so), 3 when the gate refused it, 75 when it was
    interrupted and can be resumed. Started by torchrun or accelerate launch, all processes train one run.

    Args:
        recipe: A recipe file. Not needed with --resume.
        overrides: Settings, as train.epochs=3 or data.0.path=train.json. With --resume only train.epochs or train.max_steps, which
            make a run of its own that goes on from the checkpoint.
        resume: Go on with this run from its newest whole checkpoint, or from this checkpoint (RUN/STEP, RUN/NAME, a folder), also one in a bucket:
            gs://bucket/folder for the newest there, or the address of one.
        detach: Leave it running by itself and print the id of the run.
        dry_run: Only print the plan, as nightschool plan does.
        no_background_upload: Upload each checkpoint before training goes on (checkpoints.upload.background=false).
    """
    if no_background_upload:
        if resume is not None:
            raise UsageError("A resumed run keeps its recipe. Leave --no-background-upload out, or begin a new run.")
        overrides = (*overrides, "checkpoints.upload.background=false")
    home = Home.find()
    if int(os.environ.get("RANK", "0")) > 0 and not dry_run:
        # One of several that torchrun started: the first one decides, this one trains along.
        return subprocess.run(
            command("train", "--home", str(home.path)), env=child_environment("alone"), check=False
        ).returncode
    if dry_run:
        if recipe is None or resume is not None:
            raise UsageError("A dry run plans a recipe: nightschool train RECIPE -n, without --resume.")
        return plan(recipe, *overrides)
    if resume is not None:
        if recipe is not None and "=" in recipe.name:  # a setting, where no recipe is needed
            recipe, overrides = None, (str(recipe), *overrides)
        run, checkpoint = _to_resume(home, resume, recipe, overrides)
        lengths = _other_lengths(run, recipe, overrides)
        if lengths:
            point = checkpoints.to_resume(run, checkpoint, note)
            if point is None:
                raise NotFound(f"The run {run.id} has no checkpoint to go on from. Start a new run.")
            run, checkpoint = lengthened(run, point, lengths), point.name
            note(f"The run {run.id} goes on from {point.name}.")
        if detach:
            with lock_to_hand_over(cycle_lock_path(home, run.name), f"a cycle of {run.name}") as held:
                return _detach(home, run, checkpoint, held)
        return _show(continue_cycle(home, run.id, resume=checkpoint, around=_around()))
    if recipe is None:
        raise UsageError("There is nothing to train: no RECIPE and no --resume. Write nightschool train RECIPE.")
    settings = read_recipe(recipe, overrides)
    if not detach:
        return _show(run_cycle(home, settings, trigger="manual", root=Path.cwd(), around=_around()))
    with lock_to_hand_over(cycle_lock_path(home, settings.name), f"a cycle of {settings.name}") as held:
        begun = begin_cycle(home, settings, trigger="manual", root=Path.cwd())
        if isinstance(begun, CycleResult):
            return _show(begun)
        return _detach(home, begun, None, held)


def plan(recipe: Path, /, *overrides: str) -> int:
    """Print what a run would do, and run nothing: parameters, tokens by role, cuts, bytes, time, the loss mask.

    Args:
        recipe: A recipe file.
        overrides: Settings, as train.epochs=3.
    """
    from nightschool.training.planning.plan import make_plan, render_plan

    home = Home.find()
    settings = read_recipe(recipe, overrides)
    settings = settings.begun_with(starting_weights(home, settings, say=note))
    made = make_plan(settings, home, Path.cwd(), alone=True)
    answer(
        made.to_json(),
        lambda: rendered(partial(render_plan, made)),
        quiet="{steps_total} steps, {expected_peak_bytes} bytes".format(**made.facts),
    )
    return 0


def _around() -> CycleContext:
    """Live output on the terminal; with --json beside the answer, with -q none."""
    let_children_colour()
    stream = sys.stderr if session().json else sys.stdout
    on_line: Callable[[str], None] | None = None
    if not session().quiet:

        def on_line(line: str) -> None:
            print(printable(line, colours=True), file=stream, flush=True)

    return CycleContext(on_line=on_line, on_news=on_line)


def _show(result: CycleResult) -> int:
    def text() -> str:
        lines = [f"{result.outcome}: {result.detail}"]
        if result.candidate is not None:
            lines.append(f"candidate {result.candidate}; see nightschool models report {result.candidate}")
        if result.outcome == "refused" and result.report is not None:
            lines += [f"what to do: {suggestion}" for suggestion in result.report["suggestions"]]
        if result.outcome == "interrupted":
            lines.append(f"go on with nightschool train --resume {result.run_id}")
        return "\n".join(lines)

    answer(result.to_json(), text, quiet=result.candidate or result.run_id or "")
    return result.exit_code


def _to_resume(home: Home, wanted: str, recipe: Path | None, overrides: tuple[str, ...]) -> tuple[Run, str]:
    """The run, and the checkpoint in it: `latest` where a run was named. What is only in a bucket is fetched.

    Raises:
        NotFound: If it is neither a run nor a checkpoint.
        Conflict: If the bucket has another checkpoint of this name.
    """
    if is_url(wanted):
        return _from_bucket(home, wanted, "latest")
    try:
        run, checkpoint = find_run_or_checkpoint(home, wanted)
    except NotFound:
        url = None if recipe is None else read_recipe(recipe, overrides).checkpoints.upload.url
        if url is not None:
            return _from_bucket(home, url, wanted)
        known = ", ".join(run.id for run in RunStore(home).ls()[:5]) or "none yet"
        raise NotFound(
            f"--resume {wanted!r} is neither a run nor a checkpoint in {home.runs}. Runs: {known}. "
            f"What is in a bucket is named by its address, as gs://bucket/folder."
        ) from None
    if checkpoint is None:
        return run, "latest"
    settings = settings_of(run)
    if settings is not None and settings.url is not None:
        refuse_another_in_bucket(run, checkpoint, settings.url, say=note)
    return run, checkpoint.name


def _from_bucket(home: Home, url: str, name: str) -> tuple[Run, str]:
    """Fetch a checkpoint into its run. One that began on another machine goes on as if it had begun here."""
    run, checkpoint = fetch_checkpoint(home, url, name, say=note)
    if not CycleRecord.path(run).exists():
        CycleRecord(
            trigger="resume",
            root=str(Path.cwd().resolve()),
            recipe_base=run.recipe()["base"],
            recipe_shape=Recipe.model_validate(run.recipe()).shape.given(),
            champion=None,
            data_fingerprint=str(read_manifest(checkpoint.path).facts.get("data_fingerprint", "")),
            num_new_examples=0,
        ).write(run)
    return run, checkpoint.name


def _other_lengths(run: Run, recipe: Path | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """How much longer than the run so far it is to be trained, by setting; empty if as long.

    Raises:
        Conflict: If the recipe that was given differs from the run's in more than that, which would be ignored in silence.
        UsageError: If settings other than that are changed without a recipe.
    """
    if recipe is None:
        wanted = dict(_length(override) for override in overrides)
        kept = flatten(Recipe.model_validate(run.recipe()).as_plain())
        return {key: value for key, value in wanted.items() if kept.get(key) != value}
    given = flatten(read_recipe(recipe, overrides).as_plain())
    record, kept = CycleRecord.read(run), flatten(Recipe.model_validate(run.recipe()).as_plain())
    kept |= {"base": record.recipe_base} | {f"shape.{key}": value for key, value in (record.recipe_shape or {}).items()}
    differing = [key for key in given | kept if given.get(key) != kept.get(key)]
    if not set(differing) <= set(LENGTHS):
        values = "; ".join(f"{key} is {kept.get(key)} there and {given.get(key)} here" for key in differing[:5])
        raise Conflict(
            f"The run {run.id} was begun with another recipe: {values}. A resumed run keeps its own but for train.epochs and "
            "train.max_steps; resume without a recipe, or begin a new run."
        )
    return {key: given[key] for key in differing}


def _length(override: str) -> tuple[str, int]:
    """The setting and the number of `train.epochs=5` or `train.max_steps=900`."""
    key, _, text = override.partition("=")
    key = next((length for length in LENGTHS if key in (length, length.removeprefix("train."))), "")
    if not key or not text.isdecimal():
        raise UsageError(
            f"A resumed run keeps its recipe but for its length, and {override!r} is none. Write train.epochs=5 or "
            "train.max_steps=900, or begin a new run."
        )
    return key, int(text)


def _detach(home: Home, run: Run, checkpoint: str | None, held_lock: int) -> int:
    """Leave the rest of the cycle, and its lock, to a process of its own."""
    resuming = () if checkpoint is None else ("--resume", checkpoint)
    where = ("--home", str(home.path), "--run", run.id, "--lock", str(held_lock))
    directory = Path(CycleRecord.read(run).root)
    try:
        process = start_process(
            command("cycle", *where, *resuming), log=run.log_path, directory=directory, keep_open=[held_lock]
        )
    except OSError as error:
        if run.status.state == "queued":
            run.update_status(state="failed", error=f"Its process could not be started: {error}", exit_code=1)
        raise
    data: dict[str, Any] = {"run_id": run.id, "pid": process.pid, "log": str(run.log_path)}
    answer(data, f"{run.id} runs by itself. Follow it with nightschool runs watch {run.id}.", quiet=run.id)
    # Popen warns when it is dropped while its child runs, and this child is meant to outlive us.
    process.returncode = 0
    return 0
