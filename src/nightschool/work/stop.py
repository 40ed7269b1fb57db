"""How a signal ends work: it is noted, handed to the child process, and wakes whoever sleeps."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

from nightschool.errors import Interrupted

SECOND_SIGNAL_EXIT_CODE = 130


class Stop:
    """Notes SIGINT and SIGTERM while it is entered, and forwards each to the child that is running.

    The second signal goes to the child too; without a child it ends this process at once, with exit code 130 and
    without any clean-up. What was committed is whole, because it was committed by renaming, or in a transaction.

    Signals reach Python only in the main thread; entered in another thread, a Stop notes nothing until `request`.
    Entering an entered Stop again changes nothing, so that a caller may hand down its own.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._depth = 0
        self._before: dict[int, Any] = {}
        # A pipe, because a handler may not touch the locks of threading.Event: the main thread could hold them.
        self._pipe: tuple[int, int] | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Note why work should stop (the name of a signal), wake the sleeper, tell the child."""
        self.reason = reason
        if self._pipe is not None:
            # A full pipe refuses the byte, and the earlier ones wake the sleeper all the same.
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], b"x")
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Sleep up to `seconds`; True at once when a stop is, or becomes, requested."""
        if not self.requested:
            readers = [] if self._pipe is None else [self._pipe[0]]
            select.select(readers, [], [], max(0.0, seconds))
        return self.requested

    def check(self, where: str) -> None:
        """Raise Interrupted if a stop was requested. `where` says what had not begun yet."""
        if self.requested:
            raise Interrupted(f"Stopped by a signal before {where}. Start again to go on from there.")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and self.child is None:
            os._exit(SECOND_SIGNAL_EXIT_CODE)
        self.request(signal.Signals(number).name)

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth > 1:
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        ends, self._pipe = self._pipe, None
        for end in ends or ():
            os.close(end)
