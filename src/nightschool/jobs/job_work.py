"""The work of one job: its cycle, begun or gone on with, and what is left in its folder of how that ended."""

from __future__ import annotations

from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Interrupted, Locked, NightschoolError
from nightschool.jobs.beginning import begin_cycle
from nightschool.jobs.cycle import continue_cycle, cycle_lock_path
from nightschool.jobs.launch import CycleContext, OnLine
from nightschool.jobs.outcome import CycleResult, verdict_of
from nightschool.store.atomic import write_text
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles, JobResult
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.views.results import results_csv


def do_job(queue: JobQueue, job: Job, around: CycleContext, *, say: OnLine, shared: bool = False) -> bool:
    """Do what is left to do of a job. True if it has come to its end, whatever the end is.

    Args:
        queue: The queue of its home.
        job: The job.
        around: Who watches its cycle, and who may stop it.
        say: Called with what becomes of it.
        shared: Whether this process is at other jobs, too.

    Raises:
        Locked: If another process is at the job.
    """
    home = queue.home
    files = JobFiles.of(home, job)
    with lock(files.lock_path, f"the job {job.id}"):
        before = files.result()
        if before is not None and before.is_final:
            return True
        files.enter_process(shared=shared)
        try:
            result = _result(
                queue, queue.get(job.id), files, around
            )  # a process before this one may have noted its run
        except Exception as error:
            # Nobody sees how a thread ended. To its worker the job has died, as if its process had.
            files.write_result(JobResult("killed", f"its process failed: {error!r}"))
            raise
        if result.candidate is not None and result.run_id is not None:
            write_text(files.figures_path, results_csv(RunStore(home).get(result.run_id)))
        files.write_result(result)
        say(f"{result.outcome}: {result.detail}")
        return result.is_final


def _result(queue: JobQueue, job: Job, files: JobFiles, around: CycleContext) -> JobResult:
    home = queue.home
    try:
        if job.run_id is not None:
            files.show_curves_of(RunStore(home).get(job.run_id).path)
            ended = verdict_of(RunStore(home).get(job.run_id))
            if ended is None or ended.outcome == "failed":  # which may mean that a process was killed
                ended = continue_cycle(home, job.run_id, around=around)
            return _of(ended)
        begun = _begin(home, job, around)
        if isinstance(begun, CycleResult):
            return _of(begun)
        queue.note_run(job.id, begun)
        files.show_curves_of(RunStore(home).get(begun).path)
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
