"""Where the processes of jobs run, and what a worker asks of such a place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nightschool.jobs.device_budget import Need, Room
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job
from nightschool.store.runs import Run


class JobProcess(Protocol):
    """A process with whatever it has started. It outlives the worker that started it."""

    @property
    def lives(self) -> bool: ...

    def terminate(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it now, with everything that it has started, and see it end."""

    def leave(self) -> None:
        """Another worker has its job now. End it, unless that worker finds it and watches it on."""


class StartTogether(Protocol):
    """Starts one process for several jobs."""

    def __call__(
        self, command_line: Sequence[str], group: JobFiles, members: Sequence[JobFiles]
    ) -> Sequence[JobProcess]:
        """What each of the members has of the process, in their order. Its own log is that of the `group`."""


class Executor(Protocol):
    """Starts the processes of jobs, and finds those that an earlier worker has started."""

    def plan(self, command_line: Sequence[str], files: JobFiles) -> JobProcess:
        """Start the planner of a job. Nobody looks for it later: it is started again."""

    def start(self, command_line: Sequence[str], files: JobFiles, need: Need | None) -> JobProcess:
        """Start the process of a job; `find` finds it from then on. `need` is None if there is no plan."""

    @property
    def start_together(self) -> StartTogether | None:
        """Starts one process for several jobs; None where each needs its own."""

    def find(self, files: JobFiles) -> JobProcess | None:
        """The living process of a job, whoever started it; None if there is none, or it cannot be told who it is."""

    def find_trainer(self, run: Run) -> JobProcess | None:
        """The living process that trains a run, where it can be reached from here."""

    def room(self, need: Need | None, *, besides: Job) -> Room:
        """Whether a job may begin beside the others that run; `besides` is the job itself."""
