"""Several jobs that share a base, in one process: each goes its own way in a thread of its own, and they train together.

Nothing of one job is seen in the log, the result or the end of another. One that is asked to stop by a file in its folder
(`JobFiles.request_stop`), that fails or that is done leaves; the others go on.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nightschool.errors import NightschoolError
from nightschool.events import now
from nightschool.jobs.job_work import do_job
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.processes import is_trained
from nightschool.jobs.shared_gate import SharedGate
from nightschool.jobs.shared_training import SharedTraining
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.runs import RunStore
from nightschool.units import printable
from nightschool.work.stop import Stop

_LOOK_SECONDS = 0.2


def do_jobs_together(queue: JobQueue, jobs: Sequence[Job], group_id: str, stop: Stop) -> bool:
    """Do what is left to do of jobs that share a base. True if all have come to their ends, whatever these are.

    A signal, which `stop` notes, lets all of them save and end.
    """
    folder = queue.home.groups / group_id
    training = SharedTraining(queue.home, folder, [job.id for job in jobs])
    gate, one_examines = SharedGate(queue.home, folder), threading.Lock()
    members = [_Member(queue, job, training, gate, one_examines) for job in jobs]
    for member in members:
        member.start()
    while any(member.is_alive() for member in members):
        for member in members:
            member.look(stop)
        time.sleep(_LOOK_SECONDS)
    return all(member.done for member in members)


class _Member(threading.Thread):
    """One job of the group."""

    def __init__(
        self, queue: JobQueue, job: Job, training: SharedTraining, gate: SharedGate, one_examines: threading.Lock
    ) -> None:
        super().__init__(name=job.id, daemon=True)
        self.done = False
        self._queue = queue
        self._job = job
        self._files = JobFiles.of(queue.home, job)
        self._training = training
        self._gate = gate
        self._one_examines = one_examines
        self._stop_of_mine = Stop()
        self._guard = threading.Lock()
        self._ended = False

    def look(self, everybody: Stop) -> None:
        """Pass on what was asked of this job, or of all."""
        reason = everybody.reason or ("a request" if self._files.stop_requested else None)
        with self._guard:
            if reason is not None and not self._ended and not self._stop_of_mine.requested:
                self._stop_of_mine.request(reason)

    def run(self) -> None:
        """The cycle of the job, from where it is to its end."""
        around = CycleContext(
            on_news=self._say,
            stop=self._stop_of_mine,
            machine="shared",
            trainer=self._training.trainer_of(self._job.id),
            gate_of=self._gate.of,
            examining=self._examining,
        )
        try:
            with self._stop_of_mine:
                if self._is_trained_elsewhere():
                    self._training.leave(self._job.id)
                self.done = do_job(self._queue, self._job, around, say=self._say, shared=True)
                with self._guard:
                    self._ended = True
        except NightschoolError as error:
            self._say(f"error: {error}")
        except Exception:
            self._say(traceback.format_exc())
        finally:
            self._training.leave(self._job.id)

    def _is_trained_elsewhere(self) -> bool:
        """Whether a process trains its run that outlived the one which had started it."""
        return self._job.run_id is not None and is_trained(RunStore(self._queue.home).get(self._job.run_id))

    @contextmanager
    def _examining(self) -> Iterator[None]:
        """One member is examined at a time: a gate of its own loads the base, and the shared one has it once."""
        self._training.leave(self._job.id)
        with self._one_examines:
            yield

    def _say(self, text: str) -> None:
        with self._files.log_path.open("a", encoding="utf-8") as log:
            log.write(f"{now():%Y-%m-%d %H:%M:%S} {printable(text)}\n")
