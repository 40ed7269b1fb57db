"""Jobs as processes of this machine: started by this worker, or found running when an earlier worker had died."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nightschool.jobs.device_budget import Need, Room, needs_here, room_for
from nightschool.jobs.launch import start_process
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.runs import Run
from nightschool.work.identity import ProcessIdentity

_KILL_SECONDS = 5.0


class LocalProcess:
    """One process, with whatever it has started. It outlives the worker that started it."""

    def __init__(self, identity: ProcessIdentity | None, child: subprocess.Popen[bytes] | None = None) -> None:
        self._identity = identity
        self._child = child

    def __str__(self) -> str:
        return "a process that ended" if self._identity is None else f"process {self._identity.pid}"

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

    def leave(self) -> None:
        """Another worker has its job now, and starts its own process: end this one."""
        self.kill()

    def _find(self) -> psutil.Process | None:
        return None if self._identity is None else self._identity.find()


class LocalExecutor:
    """Starts jobs as processes of this machine, which together take at most `device_bytes`."""

    def __init__(self, home: Home, queue: JobQueue, device_bytes: int | None) -> None:
        self._home = home
        self._queue = queue
        self._device_bytes = device_bytes

    def plan(self, command_line: Sequence[str], files: JobFiles) -> LocalProcess:
        return LocalProcess.start(command_line, log=files.log_path, directory=files.path)

    def start(self, command_line: Sequence[str], files: JobFiles, need: Need | None) -> LocalProcess:  # noqa: ARG002
        return LocalProcess.start(command_line, log=files.log_path, directory=files.path)

    def find(self, files: JobFiles) -> LocalProcess | None:
        """The process that holds the lock of a job, once it has said who it is."""
        return _living(files.process()) if files.process_lives else None

    def find_trainer(self, run: Run) -> LocalProcess | None:
        return _living(run.status.process)

    def room(self, need: Need | None, *, besides: Job) -> Room:
        return room_for(need, needs_here(self._home, self._queue, besides=besides), self._device_bytes)


def _living(identity: ProcessIdentity | None) -> LocalProcess | None:
    return None if identity is None or not identity.lives else LocalProcess(identity)
