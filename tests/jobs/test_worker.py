"""Workers and their jobs: what is done, what goes on after a death, what is cancelled, and what waits."""

import os
import subprocess
import sys

import pytest
from benchmarks.toy_jobs import MODULES

from nightschool.errors import UsageError
from nightschool.jobs.cycle import cycle_lock_path
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store import tables
from nightschool.store.job_files import sweep
from nightschool.store.job_queue import job_folder
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.work import processes
from tests.support.job_setups import ROOT, Jobs, kill, lives


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, **MODULES})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    return Jobs(tmp_path)


def states(jobs):
    return [job.state for job in jobs.queue.ls()]


def test_a_job_is_trained_examined_and_promoted(jobs):
    job = jobs.submit()
    jobs.drain()
    done = jobs.get(job)
    assert (done.state, done.outcome, done.attempts, done.error) == ("completed", "promoted", 1, None)
    assert done.candidate == Registry(jobs.home).champion("acme/bot").ref
    assert RunStore(jobs.home).get(done.run_id).status.candidate == done.candidate
    assert "promoted" in jobs.files(job).log_path.read_text()


def test_tensorboard_finds_the_curves_of_a_job_in_its_folder(jobs):
    from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories

    job = jobs.submit(steps=1)
    jobs.drain()
    written = jobs.run(job).path / "tensorboard"
    written.mkdir()
    (written / "events.out.tfevents.1").touch()
    folder = jobs.files(job).path
    assert (folder / "tensorboard").resolve() == written.resolve()
    assert list(GetLogdirSubdirectories(str(folder))) == [str(folder / "tensorboard")]


def test_jobs_of_one_name_follow_each_other_and_those_of_several_run_together(jobs):
    together = [jobs.submit(name=name, steps=200) for name in ("one", "two")]
    behind = jobs.submit(name="one", steps=1)
    with jobs.worker(most_running=3):
        for job in together:
            jobs.until_training(job)
        assert jobs.get(behind).state == "queued"
        jobs.until(lambda: states(jobs) == ["completed"] * 3)
    started = [jobs.get(job).started_at for job in (together[0], behind)]
    assert started[1] >= jobs.get(together[0]).finished_at


def test_no_more_run_at_once_than_were_allowed(jobs):
    for name in ("one", "two", "three"):
        jobs.submit(name=name, steps=30)
    most = []
    with jobs.worker(most_running=1):
        jobs.until(lambda: most.append(states(jobs).count("running")) or set(states(jobs)) == {"completed"})
    assert max(most) == 1


def test_a_job_that_cannot_be_read_fails_and_says_why(jobs):
    job = jobs.submit(data=[{"path": "nowhere.json"}])
    jobs.drain()
    done = jobs.get(job)
    assert done.state == "failed"
    assert "nowhere.json" in done.error


def test_a_running_job_is_cancelled_and_its_run_with_it(jobs):
    job = jobs.submit(steps=5000)
    with jobs.worker():
        trainer = jobs.until_training(job)
        jobs.queue.request_cancel(job.id)
        jobs.until(lambda: jobs.get(job).is_final)
        assert not lives(trainer)
    assert jobs.get(job).state == "cancelled"
    assert jobs.run(job).status.state == "cancelled"
    assert Registry(jobs.home).champion("acme/bot") is None


def test_a_job_that_does_not_end_in_its_grace_is_killed_with_its_trainer(jobs):
    job = jobs.submit(steps=5000)
    with jobs.worker(grace_seconds=0.5):
        trainer = jobs.until_training(job)
        trainer.suspend()  # it will not hear SIGTERM
        jobs.queue.request_cancel(job.id)
        jobs.until(lambda: jobs.get(job).is_final)
        jobs.until(lambda: not lives(trainer))
    assert jobs.get(job).state == "cancelled"


def test_a_trainer_whose_job_was_killed_does_not_survive_its_cancel(jobs):
    job = jobs.submit(steps=5000)
    with jobs.worker(most_deaths=1, grace_seconds=0.5):
        trainer = jobs.until_training(job)
        jobs.queue.request_cancel(job.id)
        kill(jobs.process(job))
        jobs.until(lambda: jobs.get(job).is_final)
        assert not lives(trainer)
    assert jobs.get(job).state == "cancelled"


def test_a_paused_job_waits_and_goes_on_from_where_it_was(jobs):
    job = jobs.submit(steps=300)
    with jobs.worker():
        jobs.until_training(job, step=5)
        jobs.queue.pause(job.id)
        jobs.until(lambda: jobs.get(job).state == "paused")
        run = jobs.run(job)
        assert run.status.state == "interrupted"
        assert 5 <= run.status.step < 300
        jobs.queue.resume(job.id)
        jobs.until(lambda: jobs.get(job).is_final)
    assert jobs.get(job).outcome == "promoted"
    assert [one.id for one in RunStore(jobs.home).ls()] == [run.id]


def test_a_worker_that_stops_lets_its_jobs_save_and_gives_them_back(jobs):
    job = jobs.submit(steps=300)
    with jobs.worker():
        trainer = jobs.until_training(job, step=5)
    assert not lives(trainer)
    waiting = jobs.get(job)
    assert (waiting.state, waiting.owner, waiting.deaths) == ("queued", None, 0)
    saved = jobs.run(job).status.step
    assert saved >= 5
    jobs.drain()
    assert jobs.get(job).outcome == "promoted"
    steps = [line.split('"step": ')[1].split(",")[0] for line in jobs.run(job).metrics_path.read_text().splitlines()]
    assert steps == [str(step) for step in range(1, 301)]


def test_a_job_whose_process_was_killed_goes_on_with_the_same_run(jobs):
    job = jobs.submit(steps=200)
    with jobs.worker():
        jobs.until_training(job, step=15)
        kill(jobs.process(job))
        jobs.until(lambda: jobs.get(job).is_final)
    done = jobs.get(job)
    assert (done.state, done.outcome) == ("completed", "promoted")
    assert done.attempts >= 2
    assert len(RunStore(jobs.home).ls()) == len(Registry(jobs.home).versions("acme/bot")) == 1


def test_a_job_whose_trainer_was_killed_goes_on_from_its_checkpoint(jobs):
    job = jobs.submit(steps=60)
    with jobs.worker():
        kill(jobs.until_training(job, step=15))
        jobs.until(lambda: jobs.get(job).is_final)
    assert jobs.get(job).outcome == "promoted"
    assert any("goes on from step 10: training failed: the process was killed by SIGKILL" in said for said in jobs.said)
    assert len(RunStore(jobs.home).ls()) == 1


def test_a_job_that_dies_again_and_again_without_coming_further_fails_and_says_how_often(jobs):
    job = jobs.submit(steps=5000)
    with jobs.worker(most_deaths=2):
        first = jobs.until_training(job)
        kill(first)
        kill(jobs.until(lambda: (found := jobs.until_training(job)).pid != first.pid and found))
        jobs.until(lambda: jobs.get(job).is_final)
    done = jobs.get(job)
    assert (done.state, done.deaths) == ("failed", 2)
    assert "It died 2 times without coming further than step 0" in done.error
    assert jobs.run(job).status.state == "failed"


def test_deaths_count_anew_once_a_job_has_come_further(jobs):
    job = jobs.submit(steps=60)
    with jobs.worker(most_deaths=2):
        for step in (15, 35):
            kill(jobs.until_training(job, step=step))
        jobs.until(lambda: jobs.get(job).is_final)
    done = jobs.get(job)
    assert (done.outcome, done.deaths) == ("promoted", 1)
    assert done.last_step >= 20


class Elsewhere:
    """A worker in a process of its own, which may be killed."""

    def __init__(self, home, **environment):
        line = [sys.executable, "-m", MODULES["worker"], "--home", str(home.path), "--until-eof"]
        self.process = subprocess.Popen(line, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


def test_a_job_outlives_its_worker_and_the_next_one_watches_it_on(jobs):
    job = jobs.submit(steps=300)
    with Elsewhere(jobs.home) as worker:
        trainer = jobs.until_training(job)
        worker.process.kill()
        worker.process.wait()
    assert lives(trainer)
    process = jobs.process(job)
    jobs.drain()
    assert any("is being worked on by process" in said for said in jobs.said)
    assert not lives(process)
    done = jobs.get(job)
    assert (done.outcome, done.deaths) == ("promoted", 0)
    assert len(RunStore(jobs.home).ls()) == len(Registry(jobs.home).versions("acme/bot")) == 1


def test_a_job_that_ended_while_no_worker_was_there_is_only_entered(jobs):
    job = jobs.submit(steps=30)
    with Elsewhere(jobs.home) as worker:
        jobs.until_training(job)
        worker.process.kill()
    jobs.until(lambda: jobs.files(job).result() is not None)
    assert jobs.get(job).state == "running"
    jobs.drain()
    assert jobs.get(job).outcome == "promoted"
    assert not any("began" in said for said in jobs.said)


def test_a_worker_ends_with_whoever_holds_its_stdin(jobs):
    job = jobs.submit(steps=5000)
    with Elsewhere(jobs.home) as worker:
        trainer = jobs.until_training(job)
        worker.process.stdin.close()
        assert worker.process.wait(60) == 0
    assert not lives(trainer)
    assert jobs.get(job).state == "queued"


def test_while_somebody_else_trains_the_name_a_job_waits_and_says_so(jobs):
    job = jobs.submit(steps=5)
    with lock(cycle_lock_path(jobs.home, "acme/bot"), "a cycle of acme/bot"), jobs.worker():
        waiting = jobs.until(lambda: (found := jobs.get(job)).detail and found)
        assert (waiting.state, waiting.attempts) == ("queued", 0)
        assert "holds a cycle of acme/bot" in waiting.detail
    with jobs.queue._db.write() as connection:
        connection.execute(tables.jobs.update().values(not_before=None))
    jobs.drain()
    assert jobs.get(job).outcome == "promoted"


def test_a_job_that_can_never_fit_fails_with_the_figures(jobs):
    job = jobs.submit(shape={"hidden_size": 2_000_000_000})  # what the toy plan takes for bytes
    jobs.drain(device_bytes=1_000_000_000)
    done = jobs.get(job)
    assert (done.state, done.run_id) == ("failed", None)
    assert "needs about 2.45 GB, and MAX_GPU_MEMORY_GB allows 1 GB in all" in done.error


def test_a_job_that_does_not_fit_beside_another_waits_until_that_one_is_done(jobs):
    first, second = (jobs.submit(name=name, steps=5000, shape={"hidden_size": 100_000_000}) for name in ("one", "two"))
    with jobs.worker(device_bytes=1_000_000_000):
        waiting = jobs.until(lambda: next((job for job in jobs.queue.ls(states=("queued",)) if job.detail), None))
        assert waiting.attempts == 0
        assert "needs about 550 MB, and 450 MB are free now" in waiting.detail
        other = first if waiting.id == second.id else second
        jobs.queue.request_cancel(other.id)
        jobs.until(lambda: jobs.get(other).is_final)
        jobs.until_training(waiting)
        assert jobs.get(waiting).state == "running"
    assert "free now" not in (jobs.get(waiting).detail or "")


def test_a_folder_without_a_job_is_removed_after_a_day(jobs):
    job = jobs.submit()
    young, old = (job_folder(jobs.home, "acme", name) for name in ("train_young", "train_old"))
    for folder in (young, old):
        folder.mkdir()
    for folder in (old, jobs.files(job).path):
        os.utime(folder, (0, 0))
    assert sweep(jobs.home, jobs.queue) == [old]
    assert young.is_dir()
    assert jobs.files(job).path.is_dir()


def test_the_settings_of_a_worker_come_from_its_environment():
    settings = WorkerSettings.from_env(
        {"MAX_CONCURRENT_TRAININGS": "3", "MAX_GPU_MEMORY_GB": "7.5", "MAX_JOBS_PER_BASE": "4"}, grace_seconds=None
    )
    assert settings == WorkerSettings(most_running=3, device_bytes=7_500_000_000, most_together=4)
    assert WorkerSettings.from_env({"MAX_CONCURRENT_TRAININGS": "3"}, most_running=1).most_running == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_CONCURRENT_TRAININGS", "0"), ("MAX_CONCURRENT_TRAININGS", "1.5"), ("MAX_GPU_MEMORY_GB", "much"),
     ("MAX_GPU_MEMORY_GB", "-1"), ("MAX_GPU_MEMORY_GB", "nan")],
)  # fmt: skip
def test_a_setting_that_is_no_number_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is '{value}'"):
        WorkerSettings.from_env({name: value})
