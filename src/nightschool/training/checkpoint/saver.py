"""Saving while training goes on: what the loop calls, and what happens when a save fails.

`Saver.save` returns when the state is copied and the order is in the writer's hands: from then on the checkpoint is
written even if this process is killed. One save is under way at a time; the next one waits for it, and hears how it
ended. A writer that was killed is replaced, and what it had in hand is written again from the same memory.

Where several processes train together, each opens a saver with its rank, and all of them call `save` for the same target,
each with a `CheckpointContents` of what only that rank has; the names of its groups and texts must differ between ranks
(`optimizer-rank1`, `rng-rank1.json`). The facts of rank 0 go into the manifest, and `step` must be in those of each. Each
rank has a writer of its own; that of rank 0 waits for the parts of the others and commits (`store.writing.parts`). No
collective call is made: `save` does not wait for other ranks, and `settle` on any rank tells whether all were written. Such
a checkpoint is safe as soon as all ranks have copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nightschool import uploads
from nightschool.checkpoint_writer.client import WriterProcess, writing_lock
from nightschool.checkpoint_writer.commit import Order, Outcome, carry_out
from nightschool.checkpoint_writer.parts import release_stale_parts
from nightschool.checkpoint_writer.process import slices_of
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.config.recipe import Checkpoints
from nightschool.errors import DiskFull, NightschoolError
from nightschool.store import checkpoints
from nightschool.store.runs import Run
from nightschool.training.checkpoint.contents import CheckpointContents
from nightschool.training.checkpoint.snapshot import Snapshot
from nightschool.units import format_bytes
from nightschool.work.host_memory import host_bytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ranks:
    """The processes that save together, and which of them this is.

    `num_neighbours` of the others take memory of this machine, each about as much as this one. `attempt` is that of rank 0;
    without it, the next one.
    """

    rank: int = 0
    num_ranks: int = 1
    num_neighbours: int = 0
    attempt: int | None = None


@contextmanager
def open_saver(
    run: Run, settings: Checkpoints, say: Say, *, ranks: Ranks = Ranks(), stop: Callable[[], bool] = lambda: False
) -> Iterator[Saver]:
    """Start the writer of a run; at the end wait until everything is written.

    Enter it before a GPU is touched, so that the writer inherits nothing of it. Where the writer of an earlier process
    of this run is still at work, it waits for that one first.

    Args:
        run: The run.
        settings: What the recipe says of checkpoints.
        say: Gets the lines for the log.
        ranks: Who else saves.
        stop: Says that nobody has time to wait for uploads.

    Raises:
        Locked: If that takes more than ten minutes.
        DiskFull: At the end, if the last checkpoint found no room and the recipe says `stop`.
    """
    with writing_lock(run, say, rank=ranks.rank) as lock_file:
        saver = Saver(run, settings, lock_file, say, ranks, stop)
        try:
            yield saver
            saver.settle()
        except BaseException:
            saver.settle_quietly()
            raise
        finally:
            saver.close()


class Saver:
    """Writes the checkpoints of one run. See `open_saver`."""

    def __init__(
        self,
        run: Run,
        settings: Checkpoints,
        lock_file: int,
        say: Say,
        ranks: Ranks,
        stop: Callable[[], bool],
    ) -> None:
        self._ranks, self._stop = ranks, stop
        self._run, self._settings, self._lock_file, self._say = run, settings, lock_file, say
        if ranks.rank == 0 and ranks.num_ranks > 1:
            release_stale_parts(run.checkpoints_path)
        self.attempt = ranks.attempt or checkpoints.next_attempt(run)
        self._pending: tuple[Order, list[tuple[str, int, int]]] | None = None
        self._failed: Outcome | None = None
        self._memory: SharedMemory | None = None
        self._snapshot: Snapshot | None = None
        self._writer: WriterProcess | None = None
        if settings.background:
            self._memory = SharedMemory.create()
            self._snapshot = Snapshot(self._memory)
            self._start_writer()

    def expect(self, size_bytes: int) -> None:
        """Make memory for a state of about this size ready, in the background: more saves than one will come."""
        if self._writer is not None and self._fits(size_bytes):
            self._writer.reserve(size_bytes)

    def save(self, target: Path, contents: CheckpointContents, *, last: bool = False) -> None:
        """Save the state as the checkpoint `target`; on return it is safe from the death of this process.

        Args:
            target: Its folder; an older one of that name is replaced.
            contents: What it will hold; it may change as soon as this returns.
            last: Nothing is trained afterwards, so that there is nothing to be gained by a copy that was not made before.

        Raises:
            DiskFull: If the save before this one, or this one, found no room, and the recipe says `stop`.
            NightschoolError: If the save before this one failed for another reason.
        """
        started = time.perf_counter()
        self.settle()
        upload = self._settings.upload
        if self._ranks.rank == 0 and upload is not None and upload.max_pending is not None:
            uploads.wait_for_room(self._run.home, upload.max_pending, say=self._say, stop=self._stop)
        facts = contents.facts | {checkpoints.ATTEMPT: self.attempt}
        order = Order(
            target=str(target),
            facts=facts,
            keep=self._settings.keep.model_dump(mode="json"),
            rank=self._ranks.rank,
            num_ranks=self._ranks.num_ranks,
        )
        copied = None if last and not self._has_copied else self._copy(contents, order)
        if copied is None:
            self._conclude(carry_out(self._run, order, contents.stream))
        else:
            self._hand_over(order, *copied)
        if self._ranks.rank == 0:
            self._note_saving(facts["step"], target.name, background=copied is not None, started=started)
        self._raise_failure()

    def _note_saving(self, step: int, name: str, *, background: bool, started: float) -> None:
        stalled_seconds = time.perf_counter() - started
        self._run.events.write("saving", step=step, name=name, background=background, stalled_seconds=stalled_seconds)

    def _hand_over(self, order: Order, files: list[tuple[str, int, int]], end_bytes: int) -> None:
        assert self._writer is not None
        self._pending = order, files
        upload = self._settings.upload
        if not self._writer.hand_over(order, files, end_bytes) or (upload is not None and not upload.background):
            self._wait()

    def settle(self) -> None:
        """Wait for the save that is under way, and raise what went wrong with it, as `save` does."""
        self._wait()
        self._raise_failure()

    def settle_quietly(self) -> None:
        """Wait for the save that is under way, and only write down what went wrong: something else did already."""
        self._wait()
        self._failed = None

    def finish(self) -> None:
        """Wait until all is written, as `settle` does, and give the memory of copies back. No save may follow.

        The writer ends meanwhile; `close` waits for that.
        """
        self.settle()
        if self._writer is not None:
            self._writer.let_go()
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    def close(self) -> None:
        """End the writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    @property
    def _has_copied(self) -> bool:
        return self._memory is not None and self._memory.size_bytes > 0

    def _copy(self, contents: CheckpointContents, order: Order) -> tuple[list[tuple[str, int, int]], int] | None:
        """Copy the state into the shared memory, as `Snapshot.take`; None if this process must write by itself."""
        if self._writer is None or self._snapshot is None or not self._fits(contents.tensor_bytes):
            return None
        try:
            return self._snapshot.take(contents, order)
        except OSError as error:
            self._go_on_alone(f"memory for a copy of the state cannot be had: {error}")
            return None

    def _fits(self, size_bytes: int) -> bool:
        """Whether the copy finds room beside everything else; if not, this run writes in its own process from now on."""
        assert self._memory is not None
        # The others look at the same memory at the same time.
        needed, available = (
            size_bytes - self._memory.allocated_bytes,
            host_bytes().free // (1 + self._ranks.num_neighbours),
        )
        if needed <= available:
            return True
        self._go_on_alone(
            f"a copy of the state takes {format_bytes(needed)}, and {format_bytes(available)} of memory are left"
        )
        return False

    def _start_writer(self) -> None:
        assert self._memory is not None
        try:
            self._writer = WriterProcess(self._run, self._lock_file, self._memory)
        except OSError as error:
            self._go_on_alone(f"the writer of checkpoints cannot be started: {error}")

    def _go_on_alone(self, why: str) -> None:
        """Write in this process from now on."""
        self._say(f"Saving stops the training for as long as it writes: {why}")
        self._run.events.write("saving_in_process", why=why)
        self.close()

    def _wait(self) -> None:
        if self._pending is None:
            return
        assert self._writer is not None
        (order, files), self._pending = self._pending, None
        outcome = self._writer.wait()
        if outcome is None:
            outcome = self._replace_writer(order, files)
        self._conclude(outcome, told=True)

    def _replace_writer(self, order: Order, files: list[tuple[str, int, int]]) -> Outcome:
        """The writer was killed: do what it had in hand from the memory that it left, and start another one."""
        assert self._writer is not None
        assert self._memory is not None
        exit_code = self._writer.close()
        name = Path(order.target).name
        self._say(f"The writer of checkpoints ended with {exit_code} while it wrote {name}: writing it again")
        self._run.events.write("writer_died", exit_code=exit_code, name=name)
        outcome = carry_out(self._run, order, slices_of(self._memory, [list(file) for file in files]))
        self._say(str(outcome))
        self._writer = None
        self._start_writer()
        return outcome

    def _conclude(self, outcome: Outcome, *, told: bool = False) -> None:
        if not told:
            self._say(str(outcome))
        if outcome.error is None:
            return
        if outcome.disk_full and self._settings.on_full_disk == "continue":
            self._say(f"Training goes on without the checkpoint {outcome.name}, as checkpoints.on_full_disk says")
            return
        self._failed = outcome

    def _raise_failure(self) -> None:
        if self._failed is None:
            return
        failed, self._failed = self._failed, None
        assert failed.error is not None
        raise DiskFull(failed.error) if failed.disk_full else NightschoolError(failed.error)
