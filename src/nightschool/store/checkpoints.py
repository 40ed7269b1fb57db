"""Checkpoints of a run: their names, their order, which one to resume from, and which ones stay.

What a checkpoint holds is written and read elsewhere; here it is a folder with a manifest. The fact
`heldout_loss` of the manifest, where it is a number, says how good it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nightschool.errors import Conflict, Damaged, MadeByNewer, NotFound
from nightschool.store.atomic import remove_folder, sweep_partials
from nightschool.store.home import Home
from nightschool.store.manifest import Manifest, read_manifest, verify
from nightschool.store.runs import Run, RunStore
from nightschool.units import Every

if TYPE_CHECKING:  # pydantic takes 0.1 s to import, and who lists runs needs none of it
    from nightschool.config.checkpoints import Keep

HELDOUT_LOSS = "heldout_loss"
# How good a spot check found it, as numbers of which the first that differs decides, the larger one for the better; only of one
# that passes.
MERIT = "merit"
ATTEMPT = "attempt"
# Why it was saved: what the rhythm asked for, the end of an epoch, a held-out loss or a spot check that is the best, the end of the run, a
# signal, or an error that ended the run between two steps.
REASON = "reason"
Reason = Literal["interval", "epoch", "best", "final", "interrupted", "emergency"]
# A file beside the checkpoints with the name of the one that was written last: for people and for other programs.
# Whoever resumes looks at the checkpoints themselves, because a crash can come between the two.
LATEST = "latest"
_NAME = re.compile(r"checkpoint-epoch(0|[1-9][0-9]*)-step(0|[1-9][0-9]*)-files(0|[1-9][0-9]*)")

_ALIAS = re.compile(r"ckpt-step-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """One published folder of training state. `num_files` is how many data files were taken up before it."""

    path: Path
    epoch: int
    step: int
    num_files: int

    @property
    def name(self) -> str:
        return self.path.name

    def verify(self, *, digests: bool = True) -> Manifest:
        """Raises Damaged, naming the file and both values, or NotFound if it was never finished."""
        return verify(self.path, digests=digests)

    def heldout_loss(self) -> float | None:
        """The held-out loss in nats per token that its manifest states, if it is a finite number."""
        value = read_manifest(self.path).facts.get(HELDOUT_LOSS)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def merit(self) -> tuple[float, ...]:
        """How good a spot check found it, larger for better; empty where there was none, or where it did not pass."""
        values = read_manifest(self.path).facts.get(MERIT)
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            return ()
        return tuple(values)

    def attempt(self) -> int:
        """Which attempt to train the run wrote it, from 1; 0 if its manifest does not say, or cannot be read."""
        try:
            value = read_manifest(self.path).facts.get(ATTEMPT)
        except (Damaged, NotFound):
            return 0
        return value if isinstance(value, int) else 0


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be resumed from, and why."""

    checkpoint: Checkpoint
    why: str


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint, or None, and the newer ones that were skipped, newest first."""

    checkpoint: Checkpoint | None
    skipped: tuple[Skipped, ...]


def checkpoint_name(epoch: int, step: int, num_files: int) -> str:
    """`checkpoint-epoch{E}-step{S}-files{F}`."""
    assert min(epoch, step, num_files) >= 0, "positions in training are never negative"
    return f"checkpoint-epoch{epoch}-step{step}-files{num_files}"


def alias_of(step: int) -> str:
    """The alias of the version that a checkpoint was published as."""
    return f"ckpt-step-{step}"


def step_of(alias: str) -> int | None:
    """The step of a checkpoint by the alias of its version; None if it is another alias."""
    match = _ALIAS.fullmatch(alias)
    return int(match[1]) if match else None


def checkpoint_path(run: Run, epoch: int, step: int, num_files: int) -> Path:
    """Where that checkpoint is published (with `publish_directory`)."""
    return run.checkpoints_path / checkpoint_name(epoch, step, num_files)


def parse_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` going by its name, or None if this is not a name of one."""
    match = _NAME.fullmatch(path.name)
    return Checkpoint(path, *(int(part) for part in match.groups())) if match else None


def ls(run: Run) -> list[Checkpoint]:
    """The finished checkpoints of a run, oldest step first; partial ones do not exist."""
    if not run.checkpoints_path.is_dir():
        return []
    found = (parse_checkpoint(path) for path in run.checkpoints_path.iterdir() if (path / "manifest.json").is_file())
    return sorted((point for point in found if point), key=lambda point: (point.step, point.epoch, point.num_files))


def get(run: Run, name: str) -> Checkpoint:
    """The checkpoint of this name, or of this step. Raises NotFound, naming those that exist."""
    points = ls(run)
    for point in reversed(by_age(points) if name.isdecimal() else points):
        if name in (point.name, str(point.step)):
            return point
    exists = f"It has {', '.join(point.name for point in points)}." if points else "It has none."
    raise NotFound(f"The run {run.id} has no checkpoint {name!r}. {exists}")


def by_age(points: Iterable[Checkpoint]) -> list[Checkpoint]:
    """In the order in which they were written, which is that of their steps, except where a run went back.

    A run that was resumed from an earlier step than its last leaves later ones behind that are not its own any more;
    each attempt counts one more (the fact `attempt`). Clocks are not asked: they are corrected at times.
    """
    return sorted(points, key=lambda point: (point.attempt(), point.step, point.epoch, point.num_files))


def next_attempt(run: Run) -> int:
    """The number of the attempt that now begins to train this run, from 1."""
    return 1 + max((point.attempt() for point in ls(run)), default=0)


def newest_whole(run: Run, *, digests: bool = True) -> Newest:
    """The checkpoint to resume from: the newest that equals its manifest, byte by byte.

    Args:
        run: The run.
        digests: False compares only names and sizes.

    Raises:
        MadeByNewer: If a newer version of nightschool wrote it: an older one in its place would lose steps silently.
    """
    skipped = []
    for point in reversed(by_age(ls(run))):
        try:
            point.verify(digests=digests)
        except MadeByNewer:
            raise
        except (Damaged, NotFound) as error:
            skipped.append(Skipped(point, str(error)))
        else:
            return Newest(point, tuple(skipped))
    return Newest(None, tuple(skipped))


def to_resume(run: Run, resume: str | None, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `--resume` means, by name or as `latest`; None to begin at step 0. `say` hears what is skipped.

    Raises:
        NotFound: If there is no checkpoint of that name.
        Conflict: If the run would begin at step 0 beside checkpoints of an earlier attempt.
        Damaged: If none is whole.
    """
    if resume is None:
        there = ls(run)
        if there:
            raise Conflict(
                f"The run {run.id} has {len(there)} checkpoints, the newest of step {there[-1].step}. "
                "Go on from it with --resume latest, or start a new run."
            )
        return None
    if resume != "latest":
        return get(run, resume)
    newest = newest_whole(run)
    for skipped in newest.skipped:
        say(f"Skipping {skipped.checkpoint.name}: {skipped.why}")
    if newest.checkpoint is None and newest.skipped:
        raise Damaged(
            f"None of the {len(newest.skipped)} checkpoints of {run.id} is whole. Start a new run, or restore one."
        )
    if newest.checkpoint is None:
        say("There is no checkpoint yet: beginning at step 0")
    return newest.checkpoint


def find(home: Home, wanted: str, root: Path) -> Checkpoint:
    """The checkpoint that a text means: a folder, `RUN/CHECKPOINT`, or `RUN` for its newest whole one.

    Raises:
        NotFound: If there is none.
    """
    folder = parse_checkpoint(root / Path(wanted).expanduser())
    if folder is not None and folder.path.is_dir():
        return folder
    run_id, _, name = wanted.rpartition("/")
    if run_id and parse_checkpoint(Path(name)) is not None:
        return get(RunStore(home).get(run_id), name)
    newest = newest_whole(RunStore(home).get(wanted)).checkpoint
    if newest is None:
        raise NotFound(f"The run {wanted} has no whole checkpoint. List them with nightschool checkpoints ls {wanted}.")
    return newest


def nothing_is_pending(_: Path) -> bool:
    """For runs that upload nothing."""
    return False


def apply_retention(
    run: Run, keep: Keep, *, is_pending: Callable[[Path], bool] = nothing_is_pending
) -> list[Checkpoint]:
    """Remove whole checkpoints that `keep` does not name, but none that must still be uploaded.

    A milestone is the first checkpoint at or after each multiple of `keep.every`. The best are those with the lowest held-out
    losses, and as many that spot checks found best.

    Only whole checkpoints (by names and sizes) count, so that a damaged one never pushes out the only one that can be
    resumed from. Damaged ones are left for their owner to look at. What dead writers left is swept.

    Args:
        run: The run.
        keep: What stays.
        is_pending: Whether the checkpoint at a path waits to be uploaded.

    Returns:
        The removed checkpoints, oldest first.
    """
    sweep_partials(run.checkpoints_path)
    whole = by_age(point for point in ls(run) if _is_whole(point))
    losses = {point: loss for point in whole if (loss := point.heldout_loss()) is not None}
    # Of equal losses the newer one is better: it has learned longer.
    best = sorted(losses, key=lambda point: (losses[point], -point.step))[: keep.best]
    merits = {point: merit for point in whole if (merit := point.merit())}
    best += sorted(merits, key=lambda point: (merits[point], -point.step), reverse=True)[: keep.best]
    kept = {*whole[-keep.last :], *best, *_milestones(whole, keep.every)}
    removed = [point for point in whole if point not in kept and not is_pending(point.path)]
    for point in removed:
        remove_folder(point.path)
    return removed


def _milestones(points: Iterable[Checkpoint], every: Every | None) -> list[Checkpoint]:
    if every is None:
        return []
    first: dict[int, Checkpoint] = {}
    for point in sorted(points, key=lambda point: point.step):
        place = point.epoch if every.unit == "epochs" else point.step
        first.setdefault(place // int(every.amount), point)
    first.pop(0, None)
    return list(first.values())


def _is_whole(point: Checkpoint) -> bool:
    try:
        point.verify(digests=False)
    except (Damaged, NotFound):
        return False
    return True
