"""The worker: takes jobs from the queue, each into a process of its own, until it is told to stop.

`python -m nightschool.jobs.worker --home H --until-eof` runs one for as long as whoever started it lives.

Who does what. The queue says whose turn it is, and a lease in it says which worker watches a job. The process of a job
(`job_process.py`) trains, examines and promotes, and leaves in the job's folder how that ended. It outlives its worker:
the next one finds it by the lock that it holds and watches it on, or reads how it ended. So a job that was begun is
done once, whichever of the two is killed: by its first process, or by another one that goes on with the same run.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from nightschool.errors import Conflict, NightschoolError, NotFound
from nightschool.events import now
from nightschool.jobs.device_budget import Need
from nightschool.jobs.executor import Executor, JobProcess
from nightschool.jobs.local_process import LocalExecutor, LocalProcess
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store import checkpoints
from nightschool.store.atomic import make_folder, write_json
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles, JobResult, sweep
from nightschool.store.job_queue import LEASE_SECONDS, FinalState, Job, JobQueue
from nightschool.store.runs import Run, RunStore
from nightschool.units import printable
from nightschool.webhooks.deliverer import delivering
from nightschool.work.processes import command
from nightschool.work.stop import Stop

Say = Callable[[str], None]

POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_HEARTBEAT_SECONDS = LEASE_SECONDS / 4
_PAUSE_AFTER_FAULT_SECONDS = 5.0
# Until a job that did not fit, or whose name another process trains, is tried again.
_WAIT_SECONDS = 5.0
_SWEEP_SECONDS = 3600.0


@dataclass
class _Attempt:
    """A job that this worker watches, and the process that is at it. Moments are those of `time.monotonic`."""

    job: Job
    process: JobProcess
    stage: Literal["claimed", "plan", "work"]
    looked_at: float = 0.0
    kept_at: float = 0.0
    stopped_at: float | None = None


class Worker:
    """Watches the jobs of one home on this machine. Several may do so at once, also on several machines."""

    def __init__(self, home: Home, settings: WorkerSettings, *, stop: Stop, say: Say) -> None:
        self._home = home
        self._settings = settings
        self._stop = stop
        self._say = say
        self._queue = JobQueue(home.database)
        self._executor: Executor = LocalExecutor(home, self._queue, settings.device_bytes)
        self._attempts: dict[str, _Attempt] = {}
        self._claim_at = self._sweep_at = 0.0

    def serve(self, *, drain: bool = False) -> int:
        """Work until a signal comes, or, with `drain`, until nothing is queued or running.

        At a signal its jobs save and wait in the queue. Returns 0.
        """
        with self._stop, delivering(self._home.database):
            self._say(f"Waiting for jobs in {self._home.path}, at most {self._settings.most_running} at once")
            while not self._stop.requested:
                self._guarded(self._turn)
                if drain and not self._attempts and not self._unfinished():
                    break
                self._stop.wait(POLL_SECONDS)
            self._let_go()
            self._say("Stopped")
        return 0

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do some work; a database that is full, locked or gone for a while does not end the worker."""
        try:
            work()
        except (NightschoolError, OSError, SQLAlchemyError) as error:
            self._say(f"error: {error}")
            self._stop.wait(_PAUSE_AFTER_FAULT_SECONDS)

    def _turn(self) -> None:
        for attempt in list(self._attempts.values()):
            self._watch(attempt)
        moment = time.monotonic()
        if moment >= self._sweep_at:
            self._sweep_at = moment + _SWEEP_SECONDS
            sweep(self._home, self._queue)
        while moment >= self._claim_at:
            job = self._queue.claim(most_running=self._settings.most_running)
            if job is None:
                self._claim_at = moment + _LOOK_SECONDS
                break
            self._attempts[job.id] = claimed = _Attempt(job, LocalProcess(None), "claimed")
            self._ended(claimed)

    def _unfinished(self) -> bool:
        return bool(self._queue.ls(states=("queued", "running"), limit=1))

    def _watch(self, attempt: _Attempt) -> None:
        if not attempt.process.lives:
            self._ended(attempt)
            return
        moment = time.monotonic()
        if moment - attempt.looked_at >= _LOOK_SECONDS:
            attempt.looked_at = moment
            try:
                self._look(attempt, moment)
            except (Conflict, NotFound) as error:
                self._say(f"{error} Ending its process here.")
                attempt.process.leave()
                del self._attempts[attempt.job.id]
                return
        wanted = attempt.job.phase in ("cancelling", "pausing") or self._stop.requested
        if wanted and attempt.stopped_at is None:
            attempt.stopped_at = moment
            attempt.process.terminate()
        if attempt.stopped_at is not None and moment - attempt.stopped_at > self._settings.grace_seconds:
            self._say(f"{attempt.job.id} did not end in {self._settings.grace_seconds:.0f} s: killing it")
            attempt.process.kill()

    def _look(self, attempt: _Attempt, moment: float) -> None:
        """Learn what was asked for since, and give a sign of life now and then. Raises Conflict if it is ours no more."""
        if moment - attempt.kept_at >= _HEARTBEAT_SECONDS:
            attempt.kept_at = moment
            attempt.job = self._queue.heartbeat(attempt.job)
            return
        found = self._queue.get(attempt.job.id)
        if found.owner != attempt.job.owner:
            raise Conflict(f"The job {found.id} was taken over by another worker.")
        attempt.job = found

    def _begin_plan(self, job: Job, files: JobFiles) -> None:
        make_folder(files.path)
        write_json(files.recipe_path, job.recipe | {"name": job.full_name})
        where = ("--home", str(self._home.path), "--root", job.root)
        line = command("plan", *where, "--recipe", str(files.recipe_path), "--output", str(files.plan_path))
        self._attempts[job.id] = _Attempt(job, self._executor.plan(line, files), "plan")

    def _place(self, job: Job, files: JobFiles) -> None:
        """Begin the job if it fits beside what runs on this machine. One whose training goes on has its room already."""
        if self._trainer(job) is not None:
            self._begin(job, files)
            return
        room = self._executor.room(Need.of(files.plan()), besides=job)
        if room.verdict == "never":
            self._say(f"{job.id} can never run here: {room.why}")
            self._queue.finish(job, "failed", error=room.why)
        elif room.verdict == "waits":
            # What is behind it in the queue waits, too: else small jobs would keep it out for ever.
            self._queue.release(job, began=False, detail=room.why)
            self._claim_at = time.monotonic() + _WAIT_SECONDS
        else:
            self._begin(job, files)

    def _begin(self, job: Job, files: JobFiles) -> None:
        make_folder(files.path)
        line = command("job", "--home", str(self._home.path), "--job", job.id)
        process = self._executor.start(line, files, Need.of(files.plan()))
        self._attempts[job.id] = _Attempt(job, process, "work")
        going_on = "" if job.run_id is None else f", going on with {job.run_id}"
        self._say(f"{job.id} ({job.full_name}) began, attempt {job.attempts}{going_on}")

    def _ended(self, attempt: _Attempt) -> None:
        """Do what follows from the end of a process; it is tried again as a whole if the database cannot take it."""
        try:
            job = self._queue.heartbeat(attempt.job)
            files = JobFiles.of(self._home, job)
            if attempt.stage == "claimed" or files.process_lives:
                self._take(job, files)
            elif attempt.stage == "work":
                self._settle(job, files, files.result())
            else:
                self._go_on(job, files, planned=True)
        except (Conflict, NotFound) as error:
            self._say(str(error))
        if self._attempts.get(attempt.job.id) is attempt:
            del self._attempts[attempt.job.id]

    def _take(self, job: Job, files: JobFiles) -> None:
        """Go on with a job where it is: watch its process, read how that ended, or begin."""
        process = self._executor.find(files)
        if process is not None:
            self._say(f"{job.id} is being worked on by {process} already: watching it")
            self._attempts[job.id] = _Attempt(job, process, "work")
            return
        if files.process_lives:  # it has not said yet who it is, or is out of reach
            self._queue.release(job, seconds=1.0, began=False)
            return
        result = files.result()  # now that nobody can write one any more
        if (result is not None and result.is_final) or (result is None and files.process() is not None):
            self._settle(job, files, result)
        else:
            self._go_on(job, files, planned=files.plan() is not None or self._trainer(job) is not None)

    def _go_on(self, job: Job, files: JobFiles, *, planned: bool) -> None:
        """Begin what comes next, unless the job is wanted no more, or not now."""
        if job.phase == "cancelling":
            self._cancelled(job)
        elif job.phase == "pausing" or self._stop.requested:
            self._queue.release(job, began=False)
        elif planned:
            self._place(job, files)
        else:
            self._begin_plan(job, files)

    def _settle(self, job: Job, files: JobFiles, result: JobResult | None) -> None:
        """Enter how the process of a job ended. `result` is None if it said nothing, because it was killed."""
        self._claim_at = 0.0
        if result is not None and result.is_final:
            state: FinalState = "failed" if result.outcome == "failed" else "completed"
            self._queue.finish(
                job,
                state,
                outcome=result.outcome,
                candidate=result.candidate,
                detail=result.detail,
                error=result.detail if state == "failed" else None,
            )
            self._say(f"{job.id} {state}: {result.detail}")
        elif job.phase == "cancelling":
            self._cancelled(job)
        elif result is not None and result.outcome == "locked":
            self._queue.release(job, seconds=_WAIT_SECONDS, began=False, detail=result.detail)
        elif result is not None and result.outcome == "interrupted":
            self._queue.release(job, detail=result.detail)
            self._say(f"{job.id} stopped: {result.detail}")
        elif self._stop.requested or job.phase == "pausing":  # it was not quick enough, and goes on from its checkpoint
            files.forget_process()
            self._queue.release(job, detail="It was stopped before it had saved.")
        else:
            files.forget_process()
            self._died(job, "its process was killed" if result is None else result.detail)

    def _died(self, job: Job, how: str) -> None:
        """Let a job go on from its last checkpoint, unless it died too often without having come further."""
        run = self._run(job)
        points = [] if run is None else checkpoints.ls(run)
        step = max([job.last_step, *(point.step for point in points)])
        deaths = 1 if step > job.last_step else job.deaths + 1
        if deaths < self._settings.most_deaths:
            self._queue.release(job, deaths=deaths, last_step=step, detail=f"It goes on from step {step}: {how}.")
            self._say(f"{job.id} goes on from step {step}: {how}")
            return
        error = (
            f"It died {deaths} times without coming further than step {step}: {how}. The machine may be short of "
            f"memory; see nightschool jobs logs {job.id}."
        )
        if run is not None and not run.status.is_final:
            run.update_status(state="failed", error=error)
        self._queue.finish(job, "failed", error=error, deaths=deaths)
        self._say(f"{job.id} failed: {error}")

    def _cancelled(self, job: Job) -> None:
        """End a cancelled job, and whatever still trains its run."""
        run, trainer = self._run(job), self._trainer(job)
        if trainer is not None:
            self._attempts[job.id] = _Attempt(job, trainer, "work")
            return
        if run is not None and run.status.state != "completed":
            run.update_status(state="cancelled", error="The job was cancelled.")
        self._queue.finish(job, "cancelled")
        self._say(f"{job.id} cancelled")

    def _run(self, job: Job) -> Run | None:
        try:
            return None if job.run_id is None else RunStore(self._home).get(job.run_id)
        except NotFound:  # somebody has removed it
            return None

    def _trainer(self, job: Job) -> JobProcess | None:
        """The process that trains the run of a job whose own process is gone."""
        run = self._run(job)
        return None if run is None else self._executor.find_trainer(run)

    def _let_go(self) -> None:
        """Let every job save, and give it back to the queue."""
        while self._attempts:
            for attempt in list(self._attempts.values()):
                self._guarded(partial(self._watch, attempt))
            time.sleep(POLL_SECONDS)


def main(arguments: list[str] | None = None, settings: WorkerSettings | None = None) -> int:
    """Work until a signal comes, or stdin is closed. Prints into the log of whoever started it.

    Without `settings`, those of the environment hold.
    """
    parser = argparse.ArgumentParser(prog="python -m nightschool.jobs.worker", description="Do what is queued.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument(
        "--until-eof", action="store_true", help="end when stdin does: with whoever holds its other end"
    )
    given = parser.parse_args(arguments)
    stop = Stop()
    try:
        with stop:
            if given.until_eof:
                threading.Thread(target=_stop_at_eof, args=(stop,), daemon=True).start()
            home = Home(given.home.absolute())
            return Worker(home, settings or WorkerSettings.from_env(), stop=stop, say=say_with_time).serve()
    except NightschoolError as error:
        say_with_time(f"error: {error}")
        return error.exit_code


def _stop_at_eof(stop: Stop) -> None:
    while sys.stdin.buffer.read(4096):
        continue
    stop.request("the end of stdin")


def say_with_time(text: str) -> None:
    """One line of the worker's log, on stdout."""
    print(f"{now():%Y-%m-%d %H:%M:%S} [Worker] {printable(text)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
