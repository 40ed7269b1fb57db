"""The folder of a job: its data, its log, and what its process leaves for the worker, also for one that comes later."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from nightschool.errors import NotFound
from nightschool.events import now
from nightschool.store.atomic import read_json, remove_folder, write_json
from nightschool.store.files import RESULTS
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder
from nightschool.store.locks import is_held
from nightschool.store.names import home_of, is_name, tenants_of
from nightschool.work.identity import ProcessIdentity

# How its process ends when there is nothing wrong with the job, but it must go on later.
UNFINISHED = ("interrupted", "killed", "locked")
# A folder of data whose job was never submitted.
_ABANDONED = timedelta(days=1)


@dataclass(frozen=True)
class JobResult:
    """How the process of a job ended: with an outcome of its cycle, `locked` where another cycle was in the way, `killed` where one of
    its own processes was.
    """

    outcome: str
    detail: str
    run_id: str | None = None
    candidate: str | None = None

    @property
    def is_final(self) -> bool:
        return self.outcome not in UNFINISHED


@dataclass(frozen=True)
class JobFiles:
    """What lies in the folder of a job beside the data that its submitter put there."""

    path: Path

    @classmethod
    def of(cls, home: Home, job: Job) -> JobFiles:
        return cls(job_folder(home, job.tenant, job.id))

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def recipe_path(self) -> Path:
        """The recipe as the planner reads it."""
        return self.path / "recipe.json"

    @property
    def plan_path(self) -> Path:
        """What the job will take, as `training/planning/peak_bytes.py` found."""
        return self.path / "plan.json"

    @property
    def figures_path(self) -> Path:
        """The figures of each step, once the job has made a model (`store/files.py`)."""
        return self.path / RESULTS

    @property
    def lock_path(self) -> Path:
        """Held by the process of the job for as long as it lives."""
        return self.path / "job.lock"

    @property
    def submission_path(self) -> Path:
        """The id under which a cluster has the job, if one does it."""
        return self.path / "submission"

    @property
    def node_stop_path(self) -> Path:
        """There while the process of the job on a node of a cluster shall save and end, which no signal reaches."""
        return self.path / "stop-on-node"

    @property
    def _process_path(self) -> Path:
        return self.path / "process.json"

    @property
    def _stop_path(self) -> Path:
        return self.path / "stop.json"

    @property
    def _result_path(self) -> Path:
        return self.path / "result.json"

    def plan(self) -> dict[str, Any] | None:
        """The plan, if one could be made."""
        return _read(self.plan_path)

    def result(self) -> JobResult | None:
        """How the last process of the job ended; None if it said nothing, or has not ended."""
        found = _read(self._result_path)
        return None if found is None else JobResult(**found)

    def write_result(self, result: JobResult) -> None:
        write_json(self._result_path, asdict(result))

    def process(self) -> ProcessIdentity | None:
        """The process that began last and was not seen to end."""
        found = _read(self._process_path)
        return None if found is None else ProcessIdentity.parse(str(found.get("process")))

    @property
    def shares_process(self) -> bool:
        """Whether that process is at other jobs, too: then it gets no signal that is meant for this one alone."""
        found = _read(self._process_path)
        return found is not None and bool(found.get("shared", False))

    def enter_process(self, *, shared: bool = False) -> None:
        """Say that this process is at the job now; what the one before it left unfinished counts no more."""
        self._result_path.unlink(missing_ok=True)
        write_json(self._process_path, {"process": str(ProcessIdentity.mine()), "shared": shared})

    def show_curves_of(self, run_path: Path) -> None:
        """Let `tensorboard --logdir` on this folder find the curves of the job's run, by a link to them."""
        link = self.path / "tensorboard"
        if not link.is_symlink():
            # Where a file system has no links, they are still in the folder of the run.
            with contextlib.suppress(OSError):
                link.symlink_to(os.path.relpath(run_path / "tensorboard", self.path), target_is_directory=True)

    def forget_process(self) -> None:
        """The process that began last has ended, and what came of it is known."""
        self._process_path.unlink(missing_ok=True)

    @property
    def process_lives(self) -> bool:
        """Whether any process is at the job, on this machine."""
        return is_held(self.lock_path)

    @property
    def may_begin(self) -> bool:
        """Whether no process is at the job, and there is nothing to be entered of the one before."""
        if self.process_lives:
            return False
        result = self.result()
        return self.process() is None if result is None else not result.is_final

    def clear(self) -> None:
        """Make ready for a process that shares itself among jobs: what was said and asked of the one before is gone."""
        self.forget_process()
        self._result_path.unlink(missing_ok=True)
        self._stop_path.unlink(missing_ok=True)

    def request_stop(self) -> None:
        """Ask a process that is at several jobs to let this one save and end."""
        write_json(self._stop_path, {})

    @property
    def stop_requested(self) -> bool:
        return self._stop_path.exists()


def sweep(home: Home, queue: JobQueue) -> list[Path]:
    """Remove the folders of jobs that were never submitted, and of groups, once they are a day old; returns them."""
    jobs = [path for tenant in tenants_of(home) for path in _old_folders(home_of(home, tenant).jobs)]
    removed = [path for path in jobs if not _is_known(queue, path.name)] + _old_folders(home.groups)
    for path in removed:
        remove_folder(path)
    return removed


def _old_folders(folder: Path) -> list[Path]:
    paths = [path for path in folder.iterdir() if is_name(path.name)] if folder.is_dir() else []
    return [path for path in paths if now().timestamp() - path.stat().st_mtime > _ABANDONED.total_seconds()]


def _is_known(queue: JobQueue, job_id: str) -> bool:
    try:
        return queue.get(job_id) is not None
    except NotFound:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except NotFound:
        return None
