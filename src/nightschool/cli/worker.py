"""`nightschool worker`."""

from __future__ import annotations

import sys
from typing import Literal

from nightschool.cli.output import session
from nightschool.errors import UsageError
from nightschool.events import now
from nightschool.jobs.worker import Worker
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store.home import Home
from nightschool.units import parse_bytes, parse_seconds, printable
from nightschool.work.stop import Stop


def worker(
    *,
    max_running: int | None = None,
    max_device_memory: str | None = None,
    max_per_base: int | None = None,
    grace: str = "60s",
    drain: bool = False,
    executor: Literal["local", "ray"] | None = None,
    ray_address: str | None = None,
) -> int:
    """Do the queued jobs, each in a process of its own, until SIGTERM or Ctrl-C.

    A job whose worker or process was killed goes on from its last checkpoint. Told to stop, a worker lets its jobs save
    and gives them back to the queue; told twice, it ends at once, and the next worker finds them running. Several workers
    may serve one home, also from several machines that share it and a PostgreSQL database.

    Args:
        max_running: Jobs at once on this machine; MAX_CONCURRENT_TRAININGS, or 2, without it.
        max_device_memory: What they may take together of the GPU, or of the host where there is none, as 20GB;
            MAX_GPU_MEMORY_GB without it, else all that is there.
        max_per_base: Jobs that share a base, and count as one; MAX_JOBS_PER_BASE, or 16, without it; 1 lets each train
            alone.
        grace: How long a job that shall stop may take to save before it is killed.
        drain: End as soon as nothing is queued or running.
        executor: Where jobs run: local, on this machine, or ray, on a Ray cluster (extra ray) whose nodes share the home;
            NIGHTSCHOOL_EXECUTOR, or local, without it.
        ray_address: The cluster's dashboard; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, without it.
    """
    for option, number in {"--max-running": max_running, "--max-per-base": max_per_base}.items():
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}, so that no job would ever run. Give 1 or more.")
    try:
        settings = WorkerSettings.from_env(
            most_running=max_running,
            device_bytes=None if max_device_memory is None else parse_bytes(max_device_memory),
            grace_seconds=parse_seconds(grace),
            most_together=max_per_base,
            executor=executor,
            ray_address=ray_address,
        )
    except ValueError as error:
        raise UsageError(f"{error}. See nightschool worker --help.") from None

    def say(line: str) -> None:
        if not session().quiet:
            print(f"{now():%Y-%m-%d %H:%M:%S} [Worker] {printable(line)}", file=sys.stderr, flush=True)

    return Worker(Home.find().ensure(), settings, stop=Stop(), say=say).serve(drain=drain)
