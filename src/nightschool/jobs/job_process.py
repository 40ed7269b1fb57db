"""`python -m nightschool.jobs.job_process --home H --job ID`: does the cycle of one job, or goes on with it.

Prints into the log of the job, and leaves in its folder how it ended: the worker that started it may be gone by then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Interrupted, Locked, NightschoolError
from nightschool.events import now
from nightschool.jobs.cycle import begin_cycle, continue_cycle, cycle_lock_path
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.outcome import CycleResult, verdict_of
from nightschool.store.atomic import write_text
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles, JobResult
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.units import printable
from nightschool.views.results import results_csv
from nightschool.work.stop import Stop


def main(arguments: list[str] | None = None) -> int:
    """Do what is left to do of a job. Exits with 0 if it has come to its end, whatever the end is."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.jobs.job_process", description="Do one job.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--job", required=True)
    given = parser.parse_args(arguments)
    home = Home(given.home.absolute())
    try:
        with Stop() as stop:
            queue = JobQueue(home.database)
            job = queue.get(given.job)
            files = JobFiles.of(home, job)
            with lock(files.lock_path, f"the job {job.id}"):
                return _work(home, queue, job, files, stop)
    except NightschoolError as error:
        _say(f"error: {error}")
        return error.exit_code


def _work(home: Home, queue: JobQueue, job: Job, files: JobFiles, stop: Stop) -> int:
    before = files.result()
    if before is not None and before.is_final:
        return 0
    files.enter_process()
    job = queue.get(job.id)  # the process before this one may have noted its run since
    result = _result(home, queue, job, CycleContext(on_news=_say, stop=stop, machine="shared"))
    if result.candidate is not None and result.run_id is not None:
        write_text(files.figures_path, results_csv(RunStore(home).get(result.run_id)))
    files.write_result(result)
    _say(f"{result.outcome}: {result.detail}")
    return 0 if result.is_final else Interrupted.exit_code


def _result(home: Home, queue: JobQueue, job: Job, around: CycleContext) -> JobResult:
    try:
        if job.run_id is not None:
            ended = verdict_of(RunStore(home).get(job.run_id))
            if ended is None or ended.outcome == "failed":  # which may mean that a process was killed
                ended = continue_cycle(home, job.run_id, around=around)
            return _of(ended)
        begun = _begin(home, job, around)
        if isinstance(begun, CycleResult):
            return _of(begun)
        queue.note_run(job.id, begun)
        return _of(continue_cycle(home, begun, resume=None, around=around))
    except Interrupted as error:
        return JobResult("interrupted", str(error))
    except Locked as error:
        return JobResult("locked", str(error))
    except (NightschoolError, OSError) as error:
        return JobResult("failed", str(error))


def _begin(home: Home, job: Job, around: CycleContext) -> str | CycleResult:
    """Create the run of the job and return its id. It trains nothing yet, so that a death from here on finds it."""
    recipe = Recipe.model_validate(job.recipe | {"name": job.full_name})
    with lock(cycle_lock_path(home, recipe.name), f"a cycle of {recipe.name}"):
        begun = begin_cycle(home, recipe, trigger="manual", root=Path(job.root), around=around)
    return begun if isinstance(begun, CycleResult) else begun.id


def _of(result: CycleResult) -> JobResult:
    return JobResult("killed" if result.was_killed else result.outcome, result.detail, result.run_id, result.candidate)


def _say(text: str) -> None:
    print(f"{now():%Y-%m-%d %H:%M:%S} {printable(text)}", flush=True)  # noqa: T201 - stdout is the log


if __name__ == "__main__":
    sys.exit(main())
