"""The process of a job on this machine: started by this worker, or found running when an earlier worker had died."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nightschool.jobs.launch import start_process
from nightschool.work.identity import ProcessIdentity

_KILL_SECONDS = 5.0


class LocalProcess:
    """One process, with whatever it has started. It outlives the worker that started it."""

    def __init__(self, identity: ProcessIdentity | None, child: subprocess.Popen[bytes] | None = None) -> None:
        self._identity = identity
        self._child = child

    @classmethod
    def start(cls, command_line: Sequence[str], *, log: Path, directory: Path) -> LocalProcess:
        child = start_process(command_line, log=log, machine="shared", directory=directory)
        return cls(ProcessIdentity.of(child.pid), child)

    @property
    def lives(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self._identity is not None and self._identity.lives

    @property
    def exit_code(self) -> int | None:
        """Minus the number of the signal that killed it; None if nobody knows."""
        return None if self._child is None else self._child.poll()

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self.lives and (process := self._find()) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def kill(self) -> None:
        """End it now, with everything that it has started, and see it end."""
        process = self._find()
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        deadline = time.monotonic() + _KILL_SECONDS
        while self.lives and time.monotonic() < deadline:
            time.sleep(0.02)

    def _find(self) -> psutil.Process | None:
        return None if self._identity is None else self._identity.find()
