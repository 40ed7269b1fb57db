"""The process of a job that is killed, at each stage and again while it goes on: nothing is done twice, nothing is lost."""

import os
import sys
import traceback

import pytest

from nightschool.jobs import cycle as cycles
from nightschool.jobs import job_process
from nightschool.jobs.outcome import CycleRecord
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue, job_folder
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from tests.jobs.test_cycle import School
from tests.jobs.test_scheduler_killed import _killing

# Where the process dies: before or after it called this.
STAGES = {
    "before it has said who it is": (JobFiles, "enter_process", "before"),
    "before the run was created": (RunStore, "create", "before"),
    "before the run was noted": (JobQueue, "note_run", "before"),
    "after the run was noted": (JobQueue, "note_run", "after"),
    "before training": (cycles, "run_training", "before"),
    "before the version was said": (Run, "update_status", "before"),
    "after training": (cycles, "run_training", "after"),
    "before the gate": (cycles, "run_gate", "before"),
    "after the gate": (cycles, "run_gate", "after"),
    "before the champion moved": (Registry, "promote", "before"),
    "after the champion moved": (Registry, "promote", "after"),
    "before the end was written": (JobFiles, "write_result", "before"),
    "after the end was written": (JobFiles, "write_result", "after"),
}


class Attempts:
    """A job that a worker holds, and its processes, one after the other."""

    def __init__(self, tmp_path):
        self.school = School(tmp_path)
        self.home = self.school.home
        recipe = self.school.recipe().as_plain()
        queue = JobQueue(self.home.database)
        self.job = queue.submit(Job("train_1", "default", "bot", recipe, str(tmp_path), "api"))
        job_folder(self.home, "default", self.job.id).mkdir(parents=True)
        queue.claim(most_running=1)
        self.home.database.close()

    def start(self, kill_at=None):
        """Run the process of the job; True if it was killed at that stage, else it ended by itself."""
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._work(kill_at))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(99)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)

    def _work(self, kill_at):
        cycles.run_training, cycles.run_gate = (
            self._noted("trained", self.school.train),
            self._noted("examined", self.school.examine),
        )
        if kill_at is not None:
            owner, name, when = STAGES[kill_at]
            setattr(owner, name, _killing(getattr(owner, name), when))
        return job_process.main(["--home", str(self.home.path), "--job", self.job.id])

    def _noted(self, what, work):
        def noted(run, *arguments, **options):
            code = work(run, *arguments, **options)
            with (self.school.root / "done.txt").open("a") as file:
                file.write(f"{what}\n")
            return code

        return noted

    def look(self):
        """What is there in the end."""
        home = Home(self.home.path)
        done = (self.school.root / "done.txt").read_text().split()
        trained = [
            run for run in RunStore(home).ls() if CycleRecord.path(run).exists() and run.status.state != "queued"
        ]
        moves = [move for move in Registry(home).history("bot") if move.alias == "champion"]
        result = JobFiles.of(home, self.job).result()
        return {
            "outcome": result.outcome,
            "run": result.run_id == JobQueue(home.database).get(self.job.id).run_id,
            "runs": len(trained),
            "versions": len(Registry(home).versions("bot")),
            "moves": len(moves),
            "trained": done.count("trained"),
        }


EXPECTED = {"outcome": "promoted", "run": True, "runs": 1, "versions": 1, "moves": 1, "trained": 1}


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_was_killed_is_followed_by_one_that_finishes_what_is_left(tmp_path, stage):
    attempts = Attempts(tmp_path)
    assert attempts.start(kill_at=stage), "nothing calls this stage"
    assert attempts.start() is False
    found = attempts.look()
    if stage == "before the version was said":
        assert found.pop("trained") == 0  # it was killed before it could be counted
        assert found == {key: value for key, value in EXPECTED.items() if key != "trained"}
    else:
        assert found == EXPECTED


def test_a_process_that_is_killed_at_every_stage_in_turn_still_comes_to_one_end(tmp_path):
    attempts = Attempts(tmp_path)
    # What is done is not done again, so that not every stage comes twice.
    assert sum(attempts.start(kill_at=stage) for stage in STAGES) > 4
    attempts.start()
    assert {**attempts.look(), "trained": 1} == EXPECTED


def test_a_job_has_one_process_at_a_time(tmp_path, capfd):
    attempts = Attempts(tmp_path)
    with lock(JobFiles.of(attempts.home, attempts.job).lock_path, "the job"):
        assert job_process.main(["--home", str(attempts.home.path), "--job", attempts.job.id]) == 1
    assert "holds the job train_1" in capfd.readouterr().out
