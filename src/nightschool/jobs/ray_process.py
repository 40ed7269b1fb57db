"""Jobs as processes of a Ray cluster whose nodes share the home.

What a process of a job is on a machine, a submission is on a cluster. Its id is written into the job's folder before Ray gets
it, so that a worker that comes later finds it, or submits the same one again if Ray never got it: it is started once.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nightschool.errors import Unreachable
from nightschool.jobs.device_budget import PROCESS_BYTES, Need, Room, room_within
from nightschool.jobs.executor import JobProcess
from nightschool.jobs.local_process import trainer_here
from nightschool.jobs.ray_cluster import NodeSize, RayCluster, Submitted
from nightschool.store.atomic import write_text
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job
from nightschool.store.runs import Run
from nightschool.work.processes import command

_LOOK_SECONDS = 1.0
_KILL_SECONDS = 10.0
_KILL_POLL_SECONDS = 0.2


class RayProcess:
    """One submission to a cluster. While the cluster does not answer, it is taken to be as it was."""

    def __init__(self, cluster: RayCluster, submission: str, files: JobFiles, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._submission = submission
        self._files = files
        self._say = say
        self._seen: Submitted | None = None
        self._looked_at = -_LOOK_SECONDS
        self._ended = False

    def __str__(self) -> str:
        where = "" if self._seen is None or self._seen.node is None else f" on {self._seen.node}"
        return f"the Ray job {self._submission}{where}"

    @property
    def lives(self) -> bool:
        if not self._ended and time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._look()
        return not self._ended

    def _look(self) -> None:
        try:
            found = self._cluster.find(self._submission)
        except Unreachable as error:
            self._say(f"{error} {self} is taken to go on.")
            self._looked_at = time.monotonic() + 4 * _LOOK_SECONDS
            return
        self._looked_at = time.monotonic()
        self._ended = found is None or found.ended
        self._seen = found or self._seen
        if found is not None and found.failed:
            with self._files.log_path.open("a", encoding="utf-8") as log:
                log.write(f"{self}: {found.message}\n")

    def terminate(self) -> None:
        """Ask it to save and end, by a file that its node looks for; if it still waits for a node, stop it at once."""
        write_text(self._files.node_stop_path, "")
        found = self._cluster.find(self._submission)
        if found is not None and found.waits:
            self._cluster.stop(self._submission)

    def kill(self) -> None:
        """End it now, with everything that it has started, and see it end."""
        self._cluster.stop(self._submission)
        deadline = time.monotonic() + _KILL_SECONDS
        while self.lives and time.monotonic() < deadline:
            time.sleep(_KILL_POLL_SECONDS)

    def leave(self) -> None:
        """The other worker finds it by its submission, and watches it on."""


class RayExecutor:
    """Starts jobs on the nodes of a cluster, which has room for them when Ray says so.

    `device_bytes` bounds what each single job may take, `grace_seconds` how long one may take to save. Jobs share no process
    there: Ray starts and counts each by itself.
    """

    start_together = None

    def __init__(
        self, cluster: RayCluster, device_bytes: int | None, grace_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._device_bytes = device_bytes
        self._grace_seconds = grace_seconds
        self._say = say

    def plan(self, command_line: Sequence[str], files: JobFiles) -> RayProcess:
        """Plan where a job would run: where there are GPUs, on one of them."""
        size = NodeSize(gpus=min(1.0, self._cluster.largest().gpus))
        return self._submit(f"{_new_id(files)}-plan", command_line, files, size)

    def start(self, command_line: Sequence[str], files: JobFiles, need: Need | None) -> RayProcess:
        entered = _entered(files)
        found = None if entered is None else self._cluster.find(entered)
        if entered is not None and found is not None and not found.ended:
            return self._process(entered, files)  # Ray had it, and its answer was lost
        submission = entered if entered is not None and found is None else _new_id(files)
        write_text(files.submission_path, submission)
        return self._submit(submission, command_line, files, self._size(need))

    def find(self, files: JobFiles) -> RayProcess | None:
        entered = _entered(files)
        process = None if entered is None else self._process(entered, files)
        return process if process is not None and process.lives else None

    def find_trainer(self, run: Run) -> JobProcess | None:
        """Only one of this machine: on a node, a trainer ends with its job."""
        return trainer_here(run)

    def room(self, need: Need | None, *, besides: Job) -> Room:  # noqa: ARG002 - Ray counts the others
        return room_within(need, self._device_bytes) or Room("fits", "Ray starts it as soon as a node has room")

    def _size(self, need: Need | None) -> NodeSize:
        """What to ask of a node; more CPUs than any has would never come."""
        if need is None:
            return NodeSize()
        cpus = min(float(need.cpus), max(1.0, self._cluster.largest().cpus))
        host_bytes = need.gpus * PROCESS_BYTES if need.gpus else need.device_bytes
        return NodeSize(cpus, float(need.gpus), host_bytes)

    def _submit(self, submission: str, command_line: Sequence[str], files: JobFiles, size: NodeSize) -> RayProcess:
        files.node_stop_path.unlink(missing_ok=True)
        given = ("--folder", str(files.path), "--grace-seconds", str(self._grace_seconds))
        line = shlex.join(command("job-on-node", *given, "--", *command_line))
        self._cluster.submit(submission, f"{line}; exit $?", size)
        return self._process(submission, files)

    def _process(self, submission: str, files: JobFiles) -> RayProcess:
        return RayProcess(self._cluster, submission, files, self._say)


def _new_id(files: JobFiles) -> str:
    return f"{files.path.name}-{secrets.token_hex(4)}"


def _entered(files: JobFiles) -> str | None:
    path: Path = files.submission_path
    return path.read_text("utf-8").strip() or None if path.is_file() else None
