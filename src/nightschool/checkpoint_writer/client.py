"""The trainer's end: starts the writer, hands it orders, and hears how they ended.

Two processes of one run never write at the same time: the writing lock of the run is taken here and handed over. A
trainer that resumes waits in `writing_lock` until the writer of the one before has finished.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from typing import Any

from nightschool.checkpoint_writer.commit import Order, Outcome
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.store.locks import lock_to_hand_over
from nightschool.store.runs import Run
from nightschool.work.processes import command

WAIT_SECONDS = 600.0
_CLOSE_SECONDS = 600.0
_POLL_SECONDS = 0.1


@contextmanager
def writing_lock(
    run: Run, say: Callable[[str], None], *, rank: int = 0, wait_seconds: float = WAIT_SECONDS
) -> Iterator[int]:
    """Hold the writing lock of a run (of one rank of it), after a writer that is still at work for it has finished.

    Yields a descriptor to hand over.

    Raises:
        Locked: If it takes longer than `wait_seconds`.
    """

    def told() -> None:
        say(f"Waiting for the writer of an earlier process to finish a checkpoint of {run.id}")

    what = f"the checkpoints of {run.id}"
    with lock_to_hand_over(run.writing_lock_path(rank), what, wait_seconds=wait_seconds, on_wait=told) as file:
        yield file


class WriterProcess:
    """A running writer. Not for several threads at once."""

    def __init__(self, run: Run, lock_file: int, memory: SharedMemory) -> None:
        """Start it; it takes over the lock `lock_file` from its first moment."""
        self._memory = memory
        self._channel, its = Pipe()
        try:
            with its:
                self._process = subprocess.Popen(
                    command(
                        "write-checkpoints", "--home", str(run.home.path), "--run", run.id,
                        "--channel", str(its.fileno()), "--memory", str(memory.handle), "--lock", str(lock_file),
                    ),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(its.fileno(), memory.handle, lock_file),
                )  # fmt: skip
        except OSError:
            self._channel.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def reserve(self, size_bytes: int) -> None:
        """Have the memory made ready in the background. Does nothing if the writer is dead."""
        self._send({"reserve_bytes": size_bytes})

    def hand_over(self, order: Order, files: list[tuple[str, int, int]], end_bytes: int) -> bool:
        """Hand over a snapshot: each file's name, offset and size in the memory, which is used up to `end_bytes`.

        The order itself goes into the memory too, so that the message is small: a message that fits the socket's
        buffer is read by the writer even if this process dies now. Returns whether the writer lives to read it.
        """
        content = order_bytes(order, files)
        with memoryview(self._memory.view) as view:
            view[end_bytes : end_bytes + len(content)] = content
        return self._send({"order": [end_bytes, len(content)], "memory_bytes": self._memory.size_bytes})

    def wait(self) -> Outcome | None:
        """How the order that was handed over ended; None if the writer died instead of saying so."""
        while not self._channel.poll(_POLL_SECONDS):
            if not self.lives and not self._channel.poll():
                return None
        try:
            return Outcome(**json.loads(self._channel.recv_bytes()))
        except (EOFError, OSError):
            return None

    def let_go(self) -> None:
        """Let it finish and end by itself. Nothing can be handed over any more; `close` waits for its end."""
        self._channel.close()

    def close(self) -> int:
        """Let it finish and end; returns its exit code, minus the number of the signal that killed it."""
        self.let_go()
        try:
            return self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            self._channel.send_bytes(json.dumps(message).encode())
        except OSError:
            return False
        return self.lives


def order_bytes(order: Order, files: list[tuple[str, int, int]]) -> bytes:
    """The order and its files as they lie in shared memory."""
    return json.dumps({"order": asdict(order), "files": files}, allow_nan=False).encode()
