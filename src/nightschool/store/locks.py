"""Locks between processes: `flock` on a file, released by the kernel when the holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nightschool.errors import Locked
from nightschool.store.atomic import FULL, lock_now, make_folder, room_needed

_POLL_SECONDS = 0.02


@contextmanager
def lock(path: Path, what: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for the time of the block.

    The lock is exclusive between processes and between threads. The file stays behind when the lock is
    released: deleting it would let two holders lock two files of the same name.

    Args:
        path: The lock file; created with its folder when it is missing.
        what: What the lock protects, for the error message: "the schedule of support-bot".
        wait_seconds: How long to wait for another holder; 0 tries once.

    Raises:
        Locked: If another holder still has it, with its process id.
        DiskFull: If the lock file cannot be created.
    """
    with _acquired(path, what, wait_seconds) as file, _signed(file):
        yield


@contextmanager
def lock_to_hand_over(
    path: Path, what: str, *, wait_seconds: float = 0.0, on_wait: Callable[[], None] | None = None
) -> Iterator[int]:
    """Hold the lock file for the time of the block, which may start a process that goes on holding it.

    Yields the file's descriptor. A process that inherits it holds the lock from its first moment, so that nobody gets
    in between; it says so with `taken_over`. `on_wait` is called once if there is another holder to wait for.

    Raises:
        Locked, DiskFull: As `lock` does.
    """
    with _acquired(path, what, wait_seconds, on_wait) as file:
        _sign(file)
        # Closing is all afterwards: emptying the file could wipe out the signature of whoever took the lock over.
        yield file


def is_held(path: Path) -> bool:
    """Whether anybody holds a lock file now."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


@contextmanager
def taken_over(file: int) -> Iterator[None]:
    """Hold the lock whose descriptor was inherited from `lock_to_hand_over` for the time of the block."""
    # What this process starts must not hold it longer than we do.
    os.set_inheritable(file, False)  # noqa: FBT003
    try:
        with _signed(file):
            yield
    finally:
        os.close(file)


@contextmanager
def _signed(file: int) -> Iterator[None]:
    _sign(file)
    try:
        yield
    finally:
        os.ftruncate(file, 0)


@contextmanager
def _acquired(path: Path, what: str, wait_seconds: float, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    deadline = time.monotonic() + wait_seconds
    make_folder(path.parent)
    with room_needed(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not lock_now(file):
            if time.monotonic() >= deadline:
                holder = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise Locked(
                    f"Another process (pid {holder}) holds {what}. Wait until it is done, or stop that process."
                )
            if on_wait is not None:
                on_wait()
                on_wait = None
            time.sleep(_POLL_SECONDS)
        yield file
    finally:
        os.close(file)


def _sign(file: int) -> None:
    """Write the holder's process id, so that whoever is refused knows whom to look for."""
    os.ftruncate(file, 0)
    try:
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        # A nameless lock holds as well; without this nothing could be removed from a full disk.
        if error.errno not in FULL:
            raise
