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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from nightschool.errors import Conflict, NightschoolError, NotFound
from nightschool.events import now
from nightschool.jobs.device_budget import Need, Room
from nightschool.jobs.executor import JobProcess
from nightschool.jobs.executors import EXECUTORS
from nightschool.jobs.local_process import LocalProcess
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
    beside: tuple[Job, ...] = ()
    """The jobs that are planned with it, to share its base."""
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
        self._executor = EXECUTORS[settings.executor](home, self._queue, settings, say)
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
                for job in self._kept(attempt.beside):
                    self._queue.release(job, began=False)
                return
        # Who is planned beside others is only looked at afterwards, unless all shall stop.
        wanted = not attempt.beside and attempt.job.phase in ("cancelling", "pausing")
        if (wanted or self._stop.requested) and attempt.stopped_at is None:
            attempt.stopped_at = moment
            attempt.process.terminate()
        if attempt.stopped_at is not None and moment - attempt.stopped_at > self._settings.grace_seconds:
            self._say(f"{attempt.job.id} did not end in {self._settings.grace_seconds:.0f} s: killing it")
            self._kill(attempt)

    def _kill(self, attempt: _Attempt) -> None:
        """End the process of a job now. Other jobs that it was at are not at fault, and go on from their checkpoints."""
        files = JobFiles.of(self._home, attempt.job)
        shared = files.process() if files.shares_process else None
        attempt.process.kill()
        for other in self._attempts.values():
            theirs = JobFiles.of(self._home, other.job)
            if other is not attempt and shared is not None and theirs.process() == shared and theirs.result() is None:
                theirs.write_result(JobResult("interrupted", "Another job of its process did not end in time."))

    def _look(self, attempt: _Attempt, moment: float) -> None:
        """Learn what was asked for since, and give a sign of life now and then. Raises Conflict if it is ours no more."""
        if moment - attempt.kept_at >= _HEARTBEAT_SECONDS:
            attempt.kept_at = moment
            attempt.beside = tuple(self._kept(attempt.beside))
            attempt.job = self._queue.heartbeat(attempt.job)
            return
        found = self._queue.get(attempt.job.id)
        if found.owner != attempt.job.owner:
            raise Conflict(f"The job {found.id} was taken over by another worker.")
        attempt.job = found

    def _kept(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs that are still this worker's, as the queue has them now, after a sign of life."""
        kept = []
        for job in jobs:
            try:
                kept.append(self._queue.heartbeat(job))
            except (Conflict, NotFound) as error:
                self._say(str(error))
        return kept

    def _begin_plan(self, jobs: Sequence[Job], unplanned: Sequence[Job]) -> None:
        """Plan what was not planned of jobs that begin together, mostly one, one after the other in one process."""
        line = command("plan", "--home", str(self._home.path))
        for job in unplanned:
            files = JobFiles.of(self._home, job)
            make_folder(files.path)
            write_json(files.recipe_path, job.recipe | {"name": job.full_name})
            line += ["--root", job.root, "--recipe", str(files.recipe_path), "--output", str(files.plan_path)]
        process = self._executor.plan(line, self._group_files(jobs))
        self._attempts[jobs[0].id] = _Attempt(jobs[0], process, "plan", tuple(jobs[1:]))

    def _group_files(self, jobs: Sequence[Job]) -> JobFiles:
        """Where the log of what is done for several jobs lies: with the job if there is one, for others may not see it."""
        if len(jobs) == 1:
            return JobFiles.of(self._home, jobs[0])
        assert jobs[0].group_id is not None
        files = JobFiles(self._home.groups / jobs[0].group_id)
        make_folder(files.path)
        return files

    def _place(self, jobs: Sequence[Job]) -> None:
        """Begin jobs that share a base, mostly one, if they fit beside what runs on this machine: as many of them as do."""
        first, *others = jobs
        room = self._room([first])
        if room.verdict == "never":
            self._say(f"{first.id} can never run here: {room.why}")
            self._queue.finish(first, "failed", error=room.why)
        elif room.verdict == "waits":
            # What is behind it in the queue waits, too: else small jobs would keep it out for ever.
            self._queue.release(first, began=False, detail=room.why)
            self._claim_at = time.monotonic() + _WAIT_SECONDS
        together = [first] if room.verdict == "fits" else []
        for job in others:
            room = self._room([*together, job]) if together else room
            if together and room.verdict == "fits":
                together.append(job)
            else:
                self._queue.release(job, began=False, detail=room.why if together else None)
        if together:
            self._begin(together)

    def _room(self, jobs: Sequence[Job]) -> Room:
        plans = [Need.of(JobFiles.of(self._home, job).plan()) for job in jobs]
        return self._executor.room(Need.together([need for need in plans if need is not None]), besides=jobs[0])

    def _begin(self, jobs: Sequence[Job]) -> None:
        members = [JobFiles.of(self._home, job) for job in jobs]
        for files in members:
            make_folder(files.path)
        line = command("job", "--home", str(self._home.path), *(word for job in jobs for word in ("--job", job.id)))
        if len(jobs) == 1:
            jobs = [self._queue.leave_group(jobs[0])] if jobs[0].group_id is not None else jobs
            processes: Sequence[JobProcess] = [self._executor.start(line, members[0], Need.of(members[0].plan()))]
        else:
            assert jobs[0].group_id is not None
            assert self._executor.start_together is not None
            for files in members:
                files.clear()
            line += ["--group", jobs[0].group_id]
            processes = self._executor.start_together(line, self._group_files(jobs), members)
        for job, process in zip(jobs, processes, strict=True):
            self._attempts[job.id] = _Attempt(job, process, "work")
            going_on = "" if job.run_id is None else f", going on with {job.run_id}"
            beside = "" if len(jobs) == 1 else f", on one base with {len(jobs) - 1} others"
            self._say(f"{job.id} ({job.full_name}) began, attempt {job.attempts}{going_on}{beside}")

    def _ended(self, attempt: _Attempt) -> None:
        """Do what follows from the end of a process; it is tried again as a whole if the database cannot take it."""
        try:
            if attempt.stage == "plan":
                self._set_off(self._kept([attempt.job, *attempt.beside]), planned=True)
            else:
                self._go_on(attempt, self._queue.heartbeat(attempt.job))
        except (Conflict, NotFound) as error:
            self._say(str(error))
        if self._attempts.get(attempt.job.id) is attempt:
            del self._attempts[attempt.job.id]

    def _go_on(self, attempt: _Attempt, job: Job) -> None:
        """Do what follows from a claim, or from the end of the process of a job."""
        files = JobFiles.of(self._home, job)
        if attempt.stage == "work" and not files.process_lives:
            self._settle(job, files, files.result())
        elif self._take(job, files):
            if not attempt.beside:
                attempt.job, *beside = self._with_companions(job)
                attempt.beside = tuple(beside)
            self._set_off([attempt.job, *self._kept(attempt.beside)])

    def _take(self, job: Job, files: JobFiles) -> bool:
        """Go on with a job where it is: watch its process, or read how that ended. True if there is none, and it may begin."""
        process = self._executor.find(files)
        if process is not None:
            self._say(f"{job.id} is being worked on by {process} already: watching it")
            self._attempts[job.id] = _Attempt(job, process, "work")
        elif files.process_lives:  # it has not said yet who it is, or is out of reach
            self._queue.release(job, seconds=1.0, began=False)
        elif files.may_begin:  # nobody can write a result any more
            return True
        else:
            self._settle(job, files, files.result())
        return False

    def _with_companions(self, job: Job) -> list[Job]:
        """A job that may begin, and those that share its base from now on."""
        if job.phase != "running" or self._executor.start_together is None or not self._may_share(job):
            return [job]
        found = self._queue.claim_beside(job, most=self._settings.most_together - 1, may_join=self._may_join)
        if len(found) > 1:
            self._say(f"{', '.join(one.id for one in found)} share a base")
        return found

    def _may_share(self, job: Job) -> bool:
        """Whether a job may train beside others. The last try of one that has died is its own: others may have been at fault."""
        return job.share_key is not None and job.deaths + 1 < self._settings.most_deaths

    def _may_join(self, job: Job) -> bool:
        return self._may_share(job) and JobFiles.of(self._home, job).may_begin

    def _set_off(self, jobs: Sequence[Job], *, planned: bool = False) -> None:
        """Begin what comes next for jobs that begin together, without those that are wanted no more, or not now."""
        wanted = [job for job in jobs if self._is_wanted(job)]
        # Whose training goes on has its room already, and no new process trains it.
        trained = [job for job in wanted if self._trainer(job) is not None]
        others = [job for job in wanted if job not in trained]
        if trained:
            self._begin(trained)
        unplanned = [job for job in others if not planned and JobFiles.of(self._home, job).plan() is None]
        if unplanned:
            self._begin_plan(others, unplanned)
        elif others:
            self._place(others)

    def _is_wanted(self, job: Job) -> bool:
        if job.phase == "cancelling":
            self._cancelled(job)
        elif job.phase == "pausing" or self._stop.requested:
            self._queue.release(job, began=False)
        else:
            return True
        return False

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
