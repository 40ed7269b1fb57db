"""Checkpoints of a run: their names, their order, which one to resume from, and which ones stay.

What a checkpoint holds is written and read elsewhere; here it is a folder with a manifest. The fact
`heldout_loss` of the manifest, where it is a number, says how good it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nightschool.errors import Damaged, NotFound
from nightschool.store.atomic import remove_folder, sweep_partials
from nightschool.store.manifest import Manifest, read_manifest, verify
from nightschool.store.runs import Run

HELDOUT_LOSS = "heldout_loss"
_NAME = re.compile(r"checkpoint-epoch(0|[1-9][0-9]*)-step(0|[1-9][0-9]*)-files(0|[1-9][0-9]*)")


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


def checkpoint_path(run: Run, epoch: int, step: int, num_files: int) -> Path:
    """Where that checkpoint is published (with `publish_directory`)."""
    return run.checkpoints_path / checkpoint_name(epoch, step, num_files)


def parse_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` going by its name, or None if this is no name of one."""
    match = _NAME.fullmatch(path.name)
    return Checkpoint(path, *(int(part) for part in match.groups())) if match else None


def ls(run: Run) -> list[Checkpoint]:
    """The finished checkpoints of a run, oldest step first; partial ones do not exist."""
    if not run.checkpoints_path.is_dir():
        return []
    found = (parse_checkpoint(path) for path in run.checkpoints_path.iterdir() if (path / "manifest.json").is_file())
    return sorted((point for point in found if point), key=lambda point: (point.step, point.epoch, point.num_files))


def get(run: Run, name: str) -> Checkpoint:
    """The checkpoint of this name. Raises NotFound, naming those that exist."""
    points = ls(run)
    for point in points:
        if point.name == name:
            return point
    exists = f"It has {', '.join(point.name for point in points)}." if points else "It has none."
    raise NotFound(f"The run {run.id} has no checkpoint {name!r}. {exists}")


def newest_whole(run: Run, *, digests: bool = True) -> Newest:
    """The checkpoint to resume from: the newest that equals its manifest, byte by byte.

    Args:
        run: The run.
        digests: False compares only names and sizes.
    """
    skipped = []
    for point in reversed(ls(run)):
        try:
            point.verify(digests=digests)
        except (Damaged, NotFound) as error:
            skipped.append(Skipped(point, str(error)))
        else:
            return Newest(point, tuple(skipped))
    return Newest(None, tuple(skipped))


def apply_retention(run: Run, keep_last: int, keep_best: int) -> list[Checkpoint]:
    """Remove what is neither among the `keep_last` newest nor the `keep_best` with the lowest held-out loss.

    Only whole checkpoints (by names and sizes) count, so that a damaged one never pushes out the only one that
    can be resumed from; damaged ones go once an equally new whole one is kept. What dead writers left is swept.

    Returns:
        The removed checkpoints, oldest first.
    """
    assert keep_last >= 1, "the newest checkpoint always stays"
    sweep_partials(run.checkpoints_path)
    points = ls(run)
    whole = [point for point in points if _is_whole(point)]
    if not whole:
        return []
    losses = {point: loss for point in whole if (loss := point.heldout_loss()) is not None}
    # Of equal losses the newer one is better: it has learned longer.
    best = sorted(losses, key=lambda point: (losses[point], -point.step))[:keep_best]
    kept = {*whole[-keep_last:], *best}
    removed = [point for point in points if point not in kept and (point in whole or point.step <= whole[-1].step)]
    for point in removed:
        remove_folder(point.path)
    return removed


def _is_whole(point: Checkpoint) -> bool:
    try:
        point.verify(digests=False)
    except (Damaged, NotFound):
        return False
    return True
