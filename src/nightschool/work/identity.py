"""Which process: its number, when it began, and on which machine, so that nobody is mistaken for its successor."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache

import psutil

# Clocks are corrected while processes live, so that their beginning seems to move a little.
_SAME_PROCESS_SECONDS = 5.0


@dataclass(frozen=True)
class ProcessIdentity:
    """One process among all that had or will have its number. `created_at` is in seconds since 1970."""

    host: str
    pid: int
    created_at: float

    @classmethod
    def mine(cls) -> ProcessIdentity:
        """The process that asks."""
        return _mine(os.getpid())

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The process that has this number on this machine now; None if there is none."""
        process = _living(pid)
        return None if process is None else cls(socket.gethostname(), pid, round(float(process.create_time()), 2))

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity | None:
        """What `str` made of one; None if it is nothing of the kind."""
        try:
            host, pid, created_at = text.rsplit(":", 2)
            return cls(host, int(pid), float(created_at))
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.created_at:.2f}"

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine; only of those can be told whether they live."""
        return self.host == socket.gethostname()

    def find(self) -> psutil.Process | None:
        """The living process itself; None if it ended, or is not of this machine."""
        process = _living(self.pid) if self.is_here else None
        # The kernel gives numbers out again; the process that is meant began at the moment that was written down.
        if process is None or abs(float(process.create_time()) - self.created_at) >= _SAME_PROCESS_SECONDS:
            return None
        return process

    @property
    def lives(self) -> bool:
        """Whether it still runs on this machine."""
        return self.find() is not None


@cache
def _mine(pid: int) -> ProcessIdentity:
    # By number, because a forked child has this cache, too.
    return ProcessIdentity(socket.gethostname(), pid, round(float(psutil.Process(pid).create_time()), 2))


def _living(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except (psutil.Error, ValueError):
        return None
