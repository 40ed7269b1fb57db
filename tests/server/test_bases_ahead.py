"""The base of a job is in memory when the end of its training is near, and leaves again."""

import json

import pytest

from nightschool.config.recipe import Recipe
from nightschool.engine.pool import EnginePool
from nightschool.server import bases_ahead
from nightschool.server.bases_ahead import BasesAhead
from nightschool.store.job_queue import Job, JobQueue, new_id
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.views.runs import FAR_SECONDS, NEAR_SECONDS
from tests.support.adapter_setups import House


class Service:
    """A home with a base and an adapter on it, a pool that serves it, and jobs that train there."""

    def __init__(self, path):
        self.house = House(path)
        self.home = self.house.home
        self.queue = JobQueue(self.home.database)
        self.pool = EnginePool(self.home)
        self.ahead = BasesAhead(self.pool, self.queue)

    def running(self, name="cat", base=None, method="lora"):
        """A job that trains, with its run."""
        recipe = {"name": name, "base": base or self.house.base.ref, "method": method, "data": [{"path": "x.json"}]}
        plain = Recipe.model_validate(recipe).as_plain()
        self.queue.submit(Job(new_id(), "default", name, plain, str(self.home.path), "cli"))
        job = self.queue.claim(most_running=9)
        run = RunStore(self.home).create(plain, name=name)
        run.update_status(state="running", steps_total=100)
        self.queue.note_run(job.id, run.id)
        return self.queue.get(job.id), run

    def is_loaded(self, adapter=None):
        """Whether an adapter could be served without loading anything below it."""
        return self.pool.needed_bytes(Registry(self.home).resolve(adapter or self.house.one.ref)) == 0


@pytest.fixture
def service(tmp_path):
    found = Service(tmp_path)
    yield found
    found.ahead.stop()


def seconds_to_go(run, seconds):
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({"step": 50, "seconds": float(seconds)}) + "\n")


def test_the_base_of_a_job_is_there_before_its_adapter_and_leaves_a_while_after_it(service, monkeypatch):
    job, _ = service.running()
    assert not service.is_loaded()
    service.ahead.look()
    service.ahead.look()
    assert service.is_loaded()
    service.queue.finish(job, "completed")
    service.ahead.look()
    assert service.is_loaded()
    monkeypatch.setattr(bases_ahead, "_KEPT_SECONDS", 0.0)
    service.ahead.look()
    assert not service.is_loaded()


def test_a_base_that_is_served_meanwhile_stays_when_the_job_is_forgotten(service, monkeypatch):
    job, _ = service.running()
    service.ahead.look()
    served = service.pool.open_base(service.house.one.ref)
    monkeypatch.setattr(bases_ahead, "_KEPT_SECONDS", 0.0)
    service.queue.finish(job, "completed")
    service.ahead.look()
    service.ahead.look()
    assert service.is_loaded()
    service.pool.close(served)
    assert not service.is_loaded()


def test_it_is_loaded_only_while_the_end_is_near(service):
    _, run = service.running()
    seconds_to_go(run, NEAR_SECONDS + 1)
    service.ahead.look()
    assert not service.is_loaded()
    seconds_to_go(run, NEAR_SECONDS - 1)
    service.ahead.look()
    assert service.is_loaded()
    seconds_to_go(run, FAR_SECONDS + 1)
    service.ahead.look()
    assert not service.is_loaded()


@pytest.mark.parametrize("why", ["full weights", "no room", "gone"])
def test_what_cannot_or_need_not_be_loaded_is_left_alone(service, monkeypatch, why):
    opened, open_base = [], service.pool.open_base
    monkeypatch.setattr(service.pool, "open_base", lambda *a, **k: opened.append(a) or open_base(*a, **k))
    if why == "no room":
        monkeypatch.setattr(bases_ahead, "free_bytes", lambda _: 0)
    service.running(base="gone@20200101_000000" if why == "gone" else None, method="full" if "full" in why else "lora")
    service.ahead.look()
    service.ahead.look()
    assert not opened
    assert not service.is_loaded()


def test_one_run_that_cannot_be_read_is_not_in_the_way_of_others(service):
    _, lost = service.running("lost")
    lost.recipe_path.unlink()
    service.running("cat")
    service.ahead.look()
    assert service.is_loaded()
    service.ahead.stop()
    assert not service.is_loaded()
