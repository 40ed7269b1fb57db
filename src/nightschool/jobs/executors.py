"""The places where jobs may run, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nightschool.jobs.executor import Executor
from nightschool.jobs.local_process import LocalExecutor
from nightschool.jobs.ray_cluster import open_cluster
from nightschool.jobs.ray_process import RayExecutor
from nightschool.jobs.worker_settings import ExecutorName, WorkerSettings
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue

Say = Callable[[str], None]


def _local(home: Home, queue: JobQueue, settings: WorkerSettings, say: Say) -> Executor:  # noqa: ARG001
    return LocalExecutor(home, queue, settings.device_bytes)


def _ray(home: Home, queue: JobQueue, settings: WorkerSettings, say: Say) -> Executor:  # noqa: ARG001
    return RayExecutor(open_cluster(settings.ray_address), settings.device_bytes, settings.grace_seconds, say)


EXECUTORS: Mapping[ExecutorName, Callable[[Home, JobQueue, WorkerSettings, Say], Executor]] = {
    "local": _local,
    "ray": _ray,
}
