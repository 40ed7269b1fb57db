"""Engines of one process take turns, step by step.

While a version is swapped, two of them compute: the old one answers what it took, the new one begins. Each of their
threads brings its own team of workers for tensor work, and two teams on the same cores spin in each other's way: both
become several times slower, not two times. So one step runs at a time, and whoever asked first is first.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock that is handed over in the order in which it was asked for. Not reentrant."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False


TURNS = Turns()
