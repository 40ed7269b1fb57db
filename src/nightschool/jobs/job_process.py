"""`python -m nightschool.jobs.job_process --home H --job ID`: does the cycle of one job, or goes on with it.

Prints into the log of the job, and leaves in its folder how it ended: the worker that started it may be gone by then.
`--job`, given several times, and `--group ID` do the cycles of jobs that share a base, each with its own log and end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nightschool.errors import Interrupted, NightschoolError
from nightschool.events import now
from nightschool.jobs.job_group import do_jobs_together
from nightschool.jobs.job_work import do_job
from nightschool.jobs.launch import CycleContext
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.units import printable
from nightschool.work.stop import Stop


def main(arguments: list[str] | None = None) -> int:
    """Do what is left to do of a job, or of several. Exits with 0 if each has come to its end, whatever the end is."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.jobs.job_process", description="Do one job.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--job", required=True, action="append")
    parser.add_argument("--group", help="the group of several jobs that share a base")
    given = parser.parse_args(arguments)
    queue = JobQueue(Home(given.home.absolute()).database)
    try:
        with Stop() as stop:
            jobs = [queue.get(job_id) for job_id in given.job]
            if given.group is not None:
                done = do_jobs_together(queue, jobs, given.group, stop)
            else:
                done = do_job(queue, jobs[0], CycleContext(on_news=_say, stop=stop, machine="shared"), say=_say)
            return 0 if done else Interrupted.exit_code
    except NightschoolError as error:
        _say(f"error: {error}")
        return error.exit_code


def _say(text: str) -> None:
    print(f"{now():%Y-%m-%d %H:%M:%S} {printable(text)}", flush=True)  # noqa: T201 - stdout is the log


if __name__ == "__main__":
    sys.exit(main())
