"""The order of the writes that makes a checkpoint: whoever is interrupted leaves the old state or the new one.

    files, each synced → manifest.json → folder synced → renamed → parent synced → upload journal → retention → `latest` → event

The digests are computed from the bytes on their way to the disk: what the disk then loses is found when it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nightschool import uploads
from nightschool.checkpoint_writer.disk import Pieces, write_file
from nightschool.checkpoint_writer.parts import PartRefused, SharedSave
from nightschool.config.checkpoints import Keep
from nightschool.errors import DiskFull, NightschoolError
from nightschool.events import EventLog
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory, write_text
from nightschool.store.checkpoints import LATEST
from nightschool.store.manifest import read_manifest, seal
from nightschool.store.runs import Run
from nightschool.units import format_bytes, printable

Contents = Callable[[], Iterator[tuple[str, Pieces]]]


@dataclass(frozen=True)
class Order:
    """What is to be committed, besides the bytes. Plain values, so that it can go to another process.

    `target` lies in the checkpoints of the run; `facts` go into the manifest; `keep` is the recipe's.
    `rank` says which of the `num_ranks` processes that train together gave it: see `parts`.
    """

    target: str
    facts: dict[str, Any]
    keep: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    num_ranks: int = 1


@dataclass(frozen=True)
class Outcome:
    """How an order ended. `error` is None, or says why there is no checkpoint; `disk_full` tells the reason apart."""

    name: str
    step: int
    seconds: float
    size_bytes: int = 0
    removed: list[str] = field(default_factory=list)
    error: str | None = None
    disk_full: bool = False

    def __str__(self) -> str:
        """One line for the log of the run."""
        if self.error is not None:
            return f"Not saved {self.name}: {self.error}"
        return f"Saved {self.name}: {format_bytes(self.size_bytes)} in {self.seconds:.1f} s"


def write_folder(target: Path, facts: dict[str, Any], contents: Contents, *, shared: SharedSave | None = None) -> int:
    """Publish a folder of files with a manifest; an older one under that name is replaced. Returns its bytes.

    Raises:
        PartRefused: If one of the other ranks could not write its part.
        Conflict: If one of them is gone, or did not deliver it in time.
        DiskFull: If there is no room; nothing of the target remains, and what was there before stays.
    """
    with publish_directory(target, replace=True) as folder:
        files = {name: write_file(folder / name, pieces) for name, pieces in contents()}
        if shared is not None:
            files |= shared.take_parts(folder)
        return seal(folder, files, facts).size_bytes


def carry_out(run: Run, order: Order, contents: Contents) -> Outcome:
    """Commit a checkpoint of a run, and what follows from it. Never raises for what the outcome can say.

    On a full disk retention makes room first, if it can, and the write is tried once more.
    """
    started = time.monotonic()
    target, shared = Path(order.target), _shared(run, order)
    step = int(order.facts["step"])
    try:
        if shared is not None and order.rank > 0:
            size_bytes = _write_part(shared, order.rank, contents)
            return Outcome(target.name, step, time.monotonic() - started, size_bytes)
        size_bytes = _write_with_room(run, order, contents, shared)
    except (NightschoolError, OSError) as error:
        note(run, "checkpoint_failed", step=step, name=target.name, rank=order.rank, error=str(error))
        disk_full = error.disk_full if isinstance(error, PartRefused) else isinstance(error, DiskFull)
        if shared is not None and order.rank == 0:
            with suppress(NightschoolError, OSError):  # without the word they wait until their time is up
                shared.refuse(str(error), disk_full=disk_full)
        return Outcome(target.name, step, time.monotonic() - started, error=str(error), disk_full=disk_full)
    if shared is not None:
        shared.release()
    removed, trouble = _tidy_up(run, order)
    outcome = Outcome(target.name, step, time.monotonic() - started, size_bytes, removed)
    facts = {"seconds": outcome.seconds, "size_bytes": size_bytes, "removed": removed}
    note(run, "checkpoint", step=step, name=target.name, **facts, **({"trouble": trouble} if trouble else {}))
    return outcome


def note(run: Run, event: str, **facts: Any) -> None:
    """Write an event of the run, if there is room for it: a checkpoint matters more than the word of it."""
    with suppress(OSError):
        events = EventLog(run.events_path, run_id=run.id)
        try:
            events.write(event, **facts)
        finally:
            events.close()


def _write_with_room(run: Run, order: Order, contents: Contents, shared: SharedSave | None) -> int:
    target = Path(order.target)
    if shared is not None:
        # A writer that was killed right afterwards has committed, or has sent the other ranks away.
        if shared.is_committed:
            return read_manifest(target).size_bytes
        shared.raise_refusal()
    try:
        return write_folder(target, order.facts, contents, shared=shared)
    except PartRefused as error:
        if error.disk_full:  # for the next one: the other ranks write this one no second time
            note(run, "disk_full", step=order.facts["step"], name=target.name, removed=_retain(run, order))
        raise
    except DiskFull:
        note(run, "disk_full", step=order.facts["step"], name=target.name, removed=_retain(run, order))
    return write_folder(target, order.facts, contents, shared=shared)


def _shared(run: Run, order: Order) -> SharedSave | None:
    """What the ranks need to find each other; None where one process saves alone."""
    if order.num_ranks == 1:
        return None
    facts = order.facts
    return SharedSave(
        target=Path(order.target),
        num_ranks=order.num_ranks,
        step=facts["step"],
        attempt=facts[checkpoints.ATTEMPT],
        lock_path=run.writing_lock_path,
    )


def _tidy_up(run: Run, order: Order) -> tuple[list[str], str | None]:
    """Upload, remove old ones, point at the new one. What goes wrong here makes it no less of a checkpoint."""
    removed: list[str] = []
    try:
        uploads.after_commit(run, Path(order.target), say=say)
        removed = _retain(run, order)
        write_text(run.checkpoints_path / LATEST, Path(order.target).name + "\n")
    except (NightschoolError, OSError) as error:
        return removed, str(error)
    return removed, None


def say(text: str) -> None:
    """One line in the log of the run."""
    with suppress(OSError):  # the terminal may be gone
        print(printable(text), flush=True)  # noqa: T201


def _retain(run: Run, order: Order) -> list[str]:
    removed = checkpoints.apply_retention(
        run, Keep.model_validate(order.keep), is_pending=partial(uploads.is_pending, run.home)
    )
    return [point.name for point in removed]


def _write_part(shared: SharedSave, rank: int, contents: Contents) -> int:
    if shared.is_committed:  # with the part of a writer that was killed since
        return 0
    with shared.own_part(rank) as folder:
        try:
            files = {name: write_file(folder / name, pieces) for name, pieces in contents()}
        except (NightschoolError, OSError) as error:
            shared.decline(folder, error)
            raise
        shared.deliver(folder, files)
        shared.await_commit(folder)
    return sum(file.size_bytes for file in files.values())
