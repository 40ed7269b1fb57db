"""Jobs as they are shown: with the figures of their runs, and never as running where nothing runs."""

import os
from dataclasses import replace
from datetime import timedelta

import pytest

from nightschool.errors import NotFound
from nightschool.events import now
from nightschool.store import tables
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue, job_folder
from nightschool.store.locks import lock
from nightschool.views.jobs import find_job, job_view, job_views, run_view
from nightschool.work.identity import ProcessIdentity
from tests.support.cli_home import make_run


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def queue(home):
    return JobQueue(home.database)


def submit(queue, job_id="train_1", tenant="default", **facts):
    return queue.submit(Job(job_id, tenant, "bot", {}, "/", "api", **facts))


def running(home, queue, **status):
    """A job of the queue at work in this process, and its run."""
    submit(queue)
    job = queue.claim(most_running=9)
    run = make_run(home)
    run.update_status(state="running", pid=os.getpid(), step=4, steps_total=40, **status)
    queue.note_run(job.id, run.id)
    return queue.get(job.id), run


def change(queue, **values):
    with queue._db.write() as connection:
        connection.execute(tables.jobs.update().values(values))


def dead():
    return str(replace(ProcessIdentity.mine(), created_at=1.0))


def test_a_job_that_waits_has_no_figures_yet(home, queue):
    view = job_view(home, submit(queue, metadata={"suffix": "x"}, created_by="abc"))
    assert (view.state, view.progress, view.step, view.steps_total, view.loss) == ("queued", 0.0, 0, None, None)
    assert (view.metadata, view.created_by, view.source) == ({"suffix": "x"}, "abc", "api")


def test_a_running_job_shows_how_far_its_run_is_by_the_runs_own_figures(home, queue):
    job, run = running(home, queue)
    view = job_view(home, job)
    assert (view.state, view.step, view.steps_total, view.progress) == ("running", 12, 40, 0.3)
    assert view.loss == pytest.approx(1.9)
    assert view.heldout_loss == pytest.approx(2.0)
    assert view.tokens_per_second is not None
    assert view.eta_seconds is not None
    assert view.run_id == run.id


def test_a_job_whose_worker_died_waits_for_the_next_one(home, queue):
    job, _ = running(home, queue)
    change(queue, owner=dead())
    view = job_view(home, queue.get(job.id))
    assert (view.state, view.eta_seconds) == ("queued", None)
    assert "Its worker is gone" in view.detail


def test_a_job_whose_process_outlived_its_worker_is_running(home, queue):
    job, _ = running(home, queue)
    change(queue, owner=dead())
    with lock(JobFiles.of(home, job).lock_path, "the job"):
        assert job_view(home, queue.get(job.id)).state == "running"


@pytest.mark.parametrize(("seconds", "state"), [(60, "running"), (-1, "queued")])
def test_a_worker_of_another_machine_is_believed_until_its_lease_ends(home, queue, seconds, state):
    job, _ = running(home, queue)
    change(queue, owner="elsewhere:1:2.00", lease_until=now() + timedelta(seconds=seconds))
    assert job_view(home, queue.get(job.id)).state == state


def test_a_job_that_is_being_cancelled_says_so(home, queue):
    job, _ = running(home, queue)
    queue.request_cancel(job.id)
    assert job_view(home, queue.get(job.id)).detail == "It is being cancelled."


def test_runs_that_were_started_directly_are_listed_once_and_beside_the_jobs(home, queue):
    _, run = running(home, queue)
    direct = make_run(home, name="acme/other", minutes=5)
    views = job_views(home, queue)
    assert [(view.id, view.source) for view in views] == [("train_1", "api"), (direct.id, "train")]
    assert [view.id for view in job_views(home, queue, "acme")] == [direct.id]
    assert [view.run_id for view in views] == [run.id, direct.id]
    assert len(job_views(home, queue, limit=1)) == 1


def test_a_direct_run_whose_process_died_is_not_running(home):
    run = make_run(home)
    run.update_status(state="running", pid=2**22 + 1)
    assert run_view(run).state == "interrupted"
    run.status_path.write_text("{}")
    assert run_view(run).state == "failed"


def test_a_job_is_found_by_its_id_and_by_its_run(home, queue):
    job, run = running(home, queue)
    assert find_job(home, queue, job.id).id == find_job(home, queue, run.id).id == job.id
    direct = make_run(home, name="acme/other")
    assert find_job(home, queue, direct.id).source == "train"
    for wanted, tenant in [("train_2", None), (job.id, "acme"), (run.id, "acme"), (direct.id, "default")]:
        with pytest.raises(NotFound):
            find_job(home, queue, wanted, tenant)


def test_looking_at_a_job_makes_no_folder(home, queue):
    submit(queue, tenant="acme")
    job_views(home, queue)
    assert not job_folder(home, "acme", "train_1").exists()
