"""Jobs as processes of this machine: started by this worker, or found running when an earlier worker had died."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nightschool.jobs.device_budget import Need, Room, needs_here, room_for
from nightschool.jobs.executor import JobProcess
from nightschool.jobs.launch import start_process
from nightschool.jobs.processes import is_trained
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

    def wait(self) -> None:
        """See it end."""
        if self._child is not None:
            self._child.wait()

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


class PartOfProcess:
    """What one job has of a process that is at several."""

    def __init__(self, files: JobFiles, process: LocalProcess) -> None:
        self._files = files
        self._process = process

    def __str__(self) -> str:
        return f"{self._process} beside others"

    @property
    def lives(self) -> bool:
        """Whether the process has not come to the end of this job, whatever it still does for others."""
        has_ended = self._files.result() is not None and not self._files.process_lives
        return self._process.lives and not has_ended

    def terminate(self) -> None:
        """Ask it to save this job and to leave it."""
        self._files.request_stop()

    def kill(self) -> None:
        """End the process now, and with it whatever it does for others, who go on from their checkpoints."""
        self._process.kill()

    def leave(self) -> None:
        """Another worker has this job now, and finds it there: the process lives on, for it and for others."""


class SharedTrainer:
    """A process that trains the run of a job beside others, and whose own starter is gone."""

    def __init__(self, run: Run, process: LocalProcess) -> None:
        self._run = run
        self._process = process

    def __str__(self) -> str:
        return f"{self._process} beside others"

    @property
    def lives(self) -> bool:
        return is_trained(self._run) and self._process.lives

    def terminate(self) -> None:
        """Ask it to save this run and to leave it."""
        self._run.request_stop("its job was cancelled")

    def kill(self) -> None:
        """End the process now, and with it the training of others, who go on from their checkpoints."""
        self._process.kill()

    def leave(self) -> None:
        """Another worker finds it there."""


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

    def start_together(
        self, command_line: Sequence[str], group: JobFiles, members: Sequence[JobFiles]
    ) -> list[JobProcess]:
        process = LocalProcess.start(command_line, log=group.log_path, directory=group.path)
        # It ends a moment after the last of its jobs, when nobody watches it any more.
        threading.Thread(target=process.wait, daemon=True).start()
        return [PartOfProcess(files, process) for files in members]

    def find(self, files: JobFiles) -> JobProcess | None:
        """The process that holds the lock of a job, once it has said who it is."""
        process = living(files.process()) if files.process_lives else None
        return process if process is None or not files.shares_process else PartOfProcess(files, process)

    def find_trainer(self, run: Run) -> JobProcess | None:
        return trainer_here(run)

    def room(self, need: Need | None, *, besides: Job) -> Room:
        return room_for(need, needs_here(self._home, self._queue, besides=besides), self._device_bytes)


def trainer_here(run: Run) -> JobProcess | None:
    """The living process of this machine that trains a run."""
    status = run.status
    process = living(status.process)
    if process is None or not status.shares_process:
        return process
    return SharedTrainer(run, process) if is_trained(run) else None


def living(identity: ProcessIdentity | None) -> LocalProcess | None:
    """The process of this identity; None if it ended, or is not of this machine."""
    return None if identity is None or not identity.lives else LocalProcess(identity)
