"""Moments at which a training process kills itself with SIGKILL: in the middle of what a kill from outside seldom meets.

For benchmarks and tests, in a process that was made for it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

# An expert half written into its file; one updated and not yet written; a file of a checkpoint half written, or not yet
# synced; the same of the checkpoint that an error leaves.
PLACES = ("write-back", "update", "save", "emergency save")


class Countdown:
    """Says when a call of a kind is the one to die in; counts on without an end if `left` is 0."""

    def __init__(self, left: int) -> None:
        self.left, self.count = left, 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count == self.left


def die() -> None:
    """End this process as a SIGKILL from outside would."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, left: int, *, fails_at: int = 0) -> Countdown:
    """Let this process die at the `left`-th moment of a place, once it trains.

    For an "emergency save", the `fails_at`-th micro-batch raises an error, and moments count from there.
    """
    count = Countdown(left)
    if place == "write-back":
        _arm_write_back(count)
    elif place == "update":
        _arm_update(count)
    else:
        writes = _arm_save(count)
        if place == "emergency save":
            writes.begins = False
            _fail(fails_at, writes)
    return count


class _Writes:
    """Whether writes are counted yet."""

    begins = True


def _arm_write_back(count: Countdown) -> None:
    from nightschool.layers.expert_streaming import file

    plain = os.pwrite

    def killed(descriptor: int, data: Any, place: int) -> int:
        if count():
            plain(descriptor, data[: len(data) // 2], place)
            die()
        return plain(descriptor, data, place)

    file.os.pwrite = killed


def _arm_update(count: Countdown) -> None:
    from nightschool.layers.expert_streaming.pending import PendingUpdates

    plain = PendingUpdates.catch_up

    def killed(self: Any, index: int, record: Any) -> None:
        behind = self.behind(index)
        plain(self, index, record)
        if behind and count():
            die()

    PendingUpdates.catch_up = killed  # type: ignore[method-assign]


def _arm_save(count: Countdown) -> _Writes:
    from nightschool.checkpoint_writer import disk

    writes, plain, sync = _Writes(), disk._File.write, os.fsync

    def killed(self: Any, chunk: memoryview) -> None:
        if writes.begins and count():
            plain(self, chunk[: len(chunk) // 2])
            die()
        plain(self, chunk)

    def killed_before_sync(descriptor: int) -> None:
        if writes.begins and count():
            die()
        sync(descriptor)

    disk._File.write = killed  # type: ignore[method-assign]
    os.fsync = killed_before_sync
    return writes


def _fail(at: int, writes: _Writes) -> None:
    from nightschool.training import loop

    plain, calls = loop._gradients, Countdown(at)

    def failing(*arguments: Any) -> Any:
        result = plain(*arguments)
        if calls():
            writes.begins = True
            raise RuntimeError("The device is gone.")
        return result

    loop._gradients = failing
