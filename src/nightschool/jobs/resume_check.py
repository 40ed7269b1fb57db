"""Proof that a run resumes exactly, on the run itself: the same steps without a break, and with one.

Two copies of the run are made beside it, in a home that is thrown away. In the first one process trains N steps and
saves. In the second one process trains half of them and saves, and another one resumes and trains the rest. Then both
final checkpoints are compared bit by bit. The run itself is only read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nightschool.errors import Conflict, DiskFull, Interrupted, NightschoolError
from nightschool.events import read_events
from nightschool.jobs.bitwise import Comparison, compare_checkpoints
from nightschool.jobs.launch import INTERRUPTED_EXIT_CODE, CycleContext, run_child
from nightschool.jobs.processes import how_it_ended
from nightschool.store import checkpoints
from nightschool.store.atomic import PARTIAL, sweep_partials, write_json, write_text
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.manifest import read_manifest
from nightschool.store.names import home_of, tenants_of
from nightschool.store.runs import Run, RunStatus, RunStore, recipe_yaml
from nightschool.units import Every

FEWEST_STEPS = 2
# What a run writes while it trains; the copy writes its own.
_NOT_COPIED = ("checkpoints", "tensorboard", "*.lock", "log*.txt", "events.jsonl", "status.json", "*.partial")
# Files of published versions are never written again, so that a link to a large one is as good as a copy.
_LINKED_BYTES = 1 << 16
# How long a writer that outlives its trainer may take to finish a checkpoint.
_WRITER_SECONDS = 300.0
_NEVER = "1000000000 steps"
# Figures of a row that do not depend on the clock or on the machine's load.
_EXACT_FIGURES = (
    "step",
    "loss",
    "heldout_loss",
    "token_accuracy",
    "heldout_token_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_trained",
    "tokens_trained_total",
)


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    `checkpoint` is where it began, None for step 0. `losses` are those of the uninterrupted copy, by step. `recorded`
    says in how many of these steps the run itself had written down the very same loss, and in how many another one.
    """

    run_id: str
    checkpoint: str | None
    first_step: int
    break_step: int
    last_step: int
    comparison: Comparison
    losses: dict[int, float]
    recorded_equal: int
    recorded_different: int

    @property
    def exact(self) -> bool:
        return not self.comparison.differences

    def to_json(self) -> dict[str, Any]:
        return {"exact": self.exact, **asdict(self)}


def check_resume(
    run: Run,
    *,
    steps: int,
    point: Checkpoint | None = None,
    around: CycleContext | None = None,
) -> Verdict:
    """Train `steps` steps twice from a checkpoint and compare.

    Args:
        run: The run.
        steps: How many steps; fewer where the run ends before. At least 2.
        point: Where to begin; without it, the newest whole checkpoint that lies early enough, else step 0.
        around: Who watches the processes and may stop them.

    Raises:
        Conflict: If the run is too short, or the checkpoint lies at its end.
        DiskFull: If there is no room for three checkpoints.
        Interrupted: If a signal ended it.
        NightschoolError: If a process failed.
    """
    total = _steps_total(run)
    if point is None:
        point = _early_enough(run, total - steps) or _early_enough(run, total - FEWEST_STEPS)
    first = point.step if point else 0
    steps = min(steps, total - 1 - first)
    if steps < FEWEST_STEPS:
        raise Conflict(
            f"The run {run.id} has {total} steps, so {max(0, steps)} can be repeated from step {first}, but "
            f"{FEWEST_STEPS} are needed. Choose an earlier checkpoint or a longer run."
        )
    size_bytes = _bytes_needed(run, point)
    half = steps // 2
    around = around or CycleContext()
    with around.stop, _scratch(run.home, size_bytes) as folder:
        straight = _copy(run, point, folder / "uninterrupted")
        broken = _copy(run, point, folder / "resumed")
        _train(straight, steps, around)
        _train(broken, half, around)
        _wait_for_checkpoint(broken, first + half)
        _train(broken, steps - half, around)
        ends = [_wait_for_checkpoint(copy, first + steps) for copy in (straight, broken)]
        comparison = compare_checkpoints(ends[0].path, ends[1].path)
        rows = [_rows(copy, first, first + steps) for copy in (straight, broken)]
        comparison = _with_rows(comparison, *rows)
        recorded = _rows(run, first, first + steps)
        losses = {step: row["loss"] for step, row in rows[0].items()}
    both = [step for step in losses if step in recorded]
    equal = sum(recorded[step]["loss"] == losses[step] for step in both)
    return Verdict(
        run_id=run.id,
        checkpoint=point.name if point else None,
        first_step=first,
        break_step=first + half,
        last_step=first + steps,
        comparison=comparison,
        losses=losses,
        recorded_equal=equal,
        recorded_different=len(both) - equal,
    )


def _steps_total(run: Run) -> int:
    total = run.status.steps_total
    if total is None:
        raise Conflict(
            f"The run {run.id} has not begun to train, so there is nothing to resume. Wait for its first step."
        )
    return total


def _early_enough(run: Run, before_step: int) -> Checkpoint | None:
    """The newest whole checkpoint of an earlier step than this."""
    for point in reversed(checkpoints.ls(run)):
        if point.step < before_step:
            try:
                point.verify(digests=True)
            except NightschoolError:
                continue
            return point
    return None


def _bytes_needed(run: Run, point: Checkpoint | None) -> int:
    """Room for three checkpoints as large as the largest that there is."""
    points = [point] if point else checkpoints.ls(run)
    return 3 * max((read_manifest(one.path).size_bytes for one in points), default=0)


@contextmanager
def _scratch(home: Home, size_bytes: int) -> Iterator[Path]:
    """A folder on the disk of the home, so that checkpoints can be linked; it is gone afterwards.

    What a check that was killed left behind is swept by the next one.
    """
    sweep_partials(home.path)
    free_bytes = shutil.disk_usage(home.path).free
    if free_bytes < size_bytes:
        raise DiskFull(
            f"The check needs {size_bytes} bytes for three checkpoints, but {free_bytes} are free in {home.path}. "
            "Free some space, or choose a smaller run."
        )
    folder = Path(tempfile.mkdtemp(prefix=".resume-check-", suffix=PARTIAL, dir=home.path))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # says to sweepers that somebody is at it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _copy(run: Run, point: Checkpoint | None, folder: Path) -> Run:
    """A home of its own with a copy of the run, up to the checkpoint."""
    scratch = Home(folder).ensure()
    copy = RunStore(scratch).at(run.id)
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    copy.checkpoints_path.mkdir()
    if point is not None:
        _link_tree(point.path, copy.checkpoints_path / point.name, linked_bytes=0)
    home = run.home
    for tenant in tenants_of(home):
        models, copies = home_of(home, tenant).models, home_of(scratch, tenant).models
        if models.is_dir():
            shutil.rmtree(copies, ignore_errors=True)
            _link_tree(models, copies, linked_bytes=_LINKED_BYTES)
    if home.cache.is_dir():  # what was fetched need not be fetched again
        scratch.cache.rmdir()
        scratch.cache.symlink_to(home.cache, target_is_directory=True)
    status = RunStatus(run_id=run.id, name=run.name, state="interrupted", step=point.step if point else 0)
    write_json(copy.status_path, asdict(status))
    _write_recipe(copy, run.recipe())
    return copy


def _write_recipe(copy: Run, recipe: dict[str, Any]) -> None:
    """The run's recipe, except that the copy saves only at its end, evaluates by steps, and uploads nothing."""
    kept = {key: value for key, value in (recipe.get("checkpoints") or {}).items() if key not in ("every", "upload")}
    recipe["checkpoints"] = kept | {"every": _NEVER}
    train = recipe.get("train") or {}
    if train.get("evaluate_every") is not None and Every.parse(train["evaluate_every"]).unit == "seconds":
        # By the clock the two copies would evaluate at different steps.
        train["evaluate_every"] = None
    write_text(copy.recipe_path, recipe_yaml(recipe))


def _link_tree(source: Path, target: Path, *, linked_bytes: int) -> None:
    """Copy a folder; files of at least so many bytes become further names of the same bytes, where the disk can."""

    def link(one: str, other: str) -> str:
        if Path(one).stat().st_size >= linked_bytes:
            try:
                os.link(one, other)
            except OSError:
                return shutil.copy2(one, other)
            return other
        return shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link)


def _train(copy: Run, steps: int, around: CycleContext) -> None:
    """Train a copy so many steps further, in a process of its own."""
    code = run_child(copy, "train", "--resume", "latest", "--steps", str(steps), around=around)
    if around.stop.requested or code == INTERRUPTED_EXIT_CODE:
        raise Interrupted("A signal ended the check; the run is unchanged. Start the check again.")
    if code != 0:
        raise NightschoolError(f"A process of the check failed: {_last_error(copy, code)}")


def _last_error(copy: Run, code: int) -> str:
    """What it said last; where several train together, also what the others said, because one of them was the first."""
    lines = copy.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    texts = [said[-1] if said else f"{how_it_ended(code)}. Its last line was: {lines[-1] if lines else 'none'}"]
    for log in sorted(copy.path.glob("log-*.txt")):
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        texts += [f"{log.stem}: {last}"] if last else []
    return " ".join(texts)


def _wait_for_checkpoint(copy: Run, step: int) -> Checkpoint:
    """The checkpoint of this step, which a writer may still be finishing after its trainer has ended."""
    deadline = time.monotonic() + _WRITER_SECONDS
    while True:
        for point in checkpoints.ls(copy):
            if point.step == step:
                return point
        if time.monotonic() > deadline:
            there = ", ".join(str(point.step) for point in checkpoints.ls(copy)) or "none"
            raise NightschoolError(f"The check saved no checkpoint of step {step}, only of the steps {there}.")
        time.sleep(0.1)


def _rows(run: Run, after_step: int, last_step: int) -> dict[int, dict[str, Any]]:
    """The rows of metrics of some steps, by step, with the figures that do not depend on the clock."""
    return {
        row["step"]: {key: row[key] for key in _EXACT_FIGURES if key in row}
        for row in read_events(run.metrics_path)
        if after_step < row["step"] <= last_step
    }


def _with_rows(
    comparison: Comparison, first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]
) -> Comparison:
    """Add the rows of metrics to what was compared."""
    differing = tuple(
        f"metrics of step {step}: {first.get(step)} and {second.get(step)}"
        for step in sorted(first.keys() | second.keys())
        if first.get(step) != second.get(step)
    )
    return replace(
        comparison,
        num_values=comparison.num_values + sum(len(row) for row in first.values()),
        differences=comparison.differences + differing,
    )
