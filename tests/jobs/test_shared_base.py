"""Jobs that share a base: who trains together, what a cancel, a pause or a death costs, and that the others go on."""

import json

import psutil
import pytest
from benchmarks.toy_jobs import MODULES

from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.views.jobs import find_job
from nightschool.work import processes
from tests.support.job_setups import ROOT, Jobs, kill, lives


class Adapters(Jobs):
    """Jobs that train adapters on one base, each of a tenant of its own where nothing else is said."""

    def submit(self, tenant="acme", name="bot", *, steps=30, base="org/base", **values):
        return super().submit(tenant, name, steps=steps, base=base, method="lora", **values)

    def submit_of(self, *tenants, **values):
        return [self.submit(tenant, **values) for tenant in tenants]

    def until_together(self, jobs, step=1):
        """Wait until all train; returns the process that trains them, which must be one."""
        return single({self.until_training(job, step) for job in jobs})

    def ended(self):
        """How often each job ended as what: state, outcome, runs and versions."""
        registry, runs = Registry(self.home), RunStore(self.home).ls()
        return {
            (job.tenant, job.name): (
                job.state,
                job.outcome,
                sum(run.name == job.full_name for run in runs),
                len(registry.versions(job.full_name)),
            )
            for job in self.queue.ls()
        }

    def steps(self, job):
        return [json.loads(line)["step"] for line in self.run(job).metrics_path.read_text().splitlines()]

    def until_all_ended(self):
        self.until(lambda: all(job.is_final for job in self.queue.ls()))

    def trainers(self):
        """The command lines of trainers that live."""
        return [
            found
            for process in psutil.process_iter(["cmdline"])
            if str(self.home.path) in (found := process.info["cmdline"] or []) and "train" in found[2]
        ]


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, **MODULES})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    return Adapters(tmp_path)


def single(found):
    assert len(found) == 1, found
    return found.pop()


DONE = ("completed", "promoted", 1, 1)
TENANTS = ("acme", "zoo", "lab")


def test_jobs_of_one_base_train_in_one_process_and_each_ends_as_it_would_alone(jobs):
    together = [*jobs.submit_of(*TENANTS, steps=200), jobs.submit("acme", "second", steps=200)]
    short = jobs.submit("inn", steps=2)
    with jobs.worker(most_running=1):
        trainer = jobs.until_together(together)
        assert len(jobs.trainers()) == 1
        jobs.until(lambda: jobs.get(short).is_final)
        assert lives(trainer), "nobody waits for the slowest"
        groups = {jobs.get(job).group_id for job in together}
        shown = find_job(jobs.home, jobs.queue, together[0].id)
        jobs.until_all_ended()
    assert set(jobs.ended().values()) == {DONE}
    assert len(groups) == 1
    assert shown.shares_base_with == (together[3].id,), "of its own tenant alone"
    assert {(job.group_id, job.owner, job.attempts) for job in jobs.queue.ls()} == {(None, None, 1)}
    for job in (*together, short):
        text = jobs.files(job).log_path.read_text()
        assert "promoted" in text
        assert not [other.id for other in jobs.queue.ls() if other.id != job.id and other.id in text]
        assert not [other.tenant for other in jobs.queue.ls() if other.tenant != job.tenant and other.tenant in text]


def test_a_job_that_cannot_share_trains_alone(jobs):
    together = jobs.submit_of("acme", "zoo", steps=200)
    other = jobs.submit("lab", steps=200, jobs={"share_base": False})
    with jobs.worker():
        shared, own = jobs.until_together(together), jobs.until_training(other)
        assert shared.pid != own.pid
        assert jobs.get(other).group_id is None
        jobs.until_all_ended()
    assert set(jobs.ended().values()) == {DONE}


def test_one_is_cancelled_one_is_paused_and_the_others_are_not_touched(jobs):
    first, cancelled, paused, last = together = jobs.submit_of(*TENANTS, "inn", steps=200)
    with jobs.worker():
        trainer = jobs.until_together(together, step=15)
        jobs.queue.request_cancel(cancelled.id)
        jobs.queue.pause(paused.id)
        jobs.until(lambda: jobs.get(cancelled).is_final and jobs.get(paused).state == "paused")
        assert lives(trainer)
        assert {jobs.get(job).state for job in (first, last)} == {"running"}
        assert (jobs.run(cancelled).status.state, jobs.run(paused).status.state) == ("cancelled", "interrupted")
        jobs.queue.resume(paused.id)
        jobs.until_all_ended()
    ended = jobs.ended()
    assert ended.pop(("zoo", "bot")) == ("cancelled", None, 1, 0)
    assert set(ended.values()) == {DONE}
    for job in (first, paused, last):
        assert jobs.steps(job) == list(range(1, 201))
    assert {jobs.get(job).attempts for job in (first, last)} == {1}


def test_a_member_that_does_not_stop_is_killed_and_the_others_go_on_without_blame(jobs):
    first, second, third = together = jobs.submit_of(*TENANTS, steps=200)
    with jobs.worker(grace_seconds=0.5, most_deaths=2):
        trainer = jobs.until_together(together, step=15)
        trainer.suspend()
        jobs.queue.request_cancel(second.id)
        jobs.until(lambda: jobs.get(second).is_final)
        assert not lives(trainer)
        jobs.until_all_ended()
    assert jobs.ended() == {("acme", "bot"): DONE, ("zoo", "bot"): ("cancelled", None, 1, 0), ("lab", "bot"): DONE}
    assert {jobs.get(job).deaths for job in (first, third)} == {0}


@pytest.mark.parametrize("victim", ["trainer", "supervisor"])
def test_after_a_death_all_go_on_from_where_they_were(jobs, victim):
    together = jobs.submit_of(*TENANTS, steps=200)
    with jobs.worker():
        trainer = jobs.until_together(together, step=15)
        kill(trainer if victim == "trainer" else jobs.process(together[0]))
        jobs.until_all_ended()
    assert set(jobs.ended().values()) == {DONE}
    for job in together:
        assert jobs.get(job).attempts == 2
        steps = jobs.steps(job)
        assert steps[-1] == 200
        assert len(steps) < 220


def test_the_last_try_of_a_job_that_died_is_its_own(jobs):
    together = jobs.submit_of("acme", "zoo", steps=2000)
    with jobs.worker(most_deaths=2):
        kill(jobs.until_together(together))
        jobs.until(lambda: all(jobs.get(job).deaths for job in together))
        alone = jobs.until(
            lambda: (found := {jobs.until_training(job).pid for job in together}) and len(found) == 2 and found
        )
        assert len(alone) == 2
        for job in together:
            jobs.queue.request_cancel(job.id)
        jobs.until_all_ended()


def test_a_cancel_while_nobody_supervises_ends_one_run_and_not_the_process(jobs):
    first, second = together = jobs.submit_of("acme", "zoo", steps=300)
    with jobs.worker():
        trainer = jobs.until_together(together, step=5)
        jobs.queue.request_cancel(second.id)
        kill(jobs.process(first))
        jobs.until(lambda: jobs.get(second).is_final)
        assert lives(trainer)
        jobs.until_all_ended()
    assert jobs.ended() == {("acme", "bot"): DONE, ("zoo", "bot"): ("cancelled", None, 1, 0)}


def test_a_worker_that_stops_lets_all_save_and_the_next_one_trains_them_together_again(jobs):
    together = jobs.submit_of(*TENANTS, steps=150)
    with jobs.worker():
        trainer = jobs.until_together(together, step=5)
    assert not lives(trainer)
    assert {(job.state, job.owner, job.group_id, job.deaths) for job in jobs.queue.ls()} == {("queued", None, None, 0)}
    with jobs.worker():
        jobs.until_together(together, step=20)
        jobs.until_all_ended()
    assert set(jobs.ended().values()) == {DONE}
    for job in together:
        steps = jobs.steps(job)
        assert steps == list(range(1, 151))


def test_only_as_many_begin_as_fit_beside_each_other(jobs):
    # The base and the process are there once: 100 + 450 MB, and 100 for each.
    jobs.submit_of("a", "b", "c", steps=60, lora={"r": 100})
    with jobs.worker(device_bytes=770_000_000):
        jobs.until(lambda: len([job for job in jobs.queue.ls(states=("running",)) if job.run_id]) == 2)
        assert len(jobs.queue.ls(states=("queued",))) == 1
        jobs.until_all_ended()
    assert set(jobs.ended().values()) == {DONE}
