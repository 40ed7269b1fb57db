"""The queue of jobs, on both kinds of database: who gets which job, who may change it, and what never changes again."""

import multiprocessing
import os
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.job_queue import FINAL_STATES, Job, JobQueue, job_folder, new_id
from nightschool.store.tables import jobs
from nightschool.store.tenants import Quota, Tenants
from nightschool.work.identity import ProcessIdentity
from tests.support.crash_points import kill_everywhere
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401

START = now()
ELSEWHERE = "another-machine:7:1.00"


@pytest.fixture
def queue(db):  # noqa: F811
    return JobQueue(db)


def a_job(number=0, tenant="acme", name=None, **facts):
    created_at = START + timedelta(seconds=number)
    return Job(f"train_{number:012x}", tenant, name or f"bot-{number}", {"method": "lora"}, "/data", "api",
               created_at=created_at, **facts)  # fmt: skip


def dead_process():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return str(replace(ProcessIdentity.mine(), pid=child))


def hold(db, job, **values):  # noqa: F811
    with db.write() as connection:
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(values))


def claim(queue, most_running=10, **options):
    return queue.claim(most_running=most_running, **options)


def test_a_job_comes_back_as_it_was_submitted(queue):
    job = a_job(metadata={"suffix": "mine\0", "n": 1}, created_by="abc")
    kept = queue.submit(job)
    assert kept == queue.get(job.id)
    assert replace(kept, share_key=None) == job
    assert (job.full_name, job.state, job.is_final) == ("acme/bot-0", "queued", False)


def test_ids_are_random_and_as_long_as_asked_for():
    assert len({new_id() for _ in range(100)}) == 100
    assert len(new_id()) == len("train_") + 12
    assert len(new_id("ftjob-", 24)) == len("ftjob-") + 24


def test_no_two_jobs_have_one_id(queue):
    queue.submit(a_job())
    with pytest.raises(Conflict, match="There is a job train_000000000000 already"):
        queue.submit(a_job(tenant="other"))


@pytest.mark.parametrize("facts", [{"id": "../x"}, {"tenant": "a/b"}, {"name": ".."}])
def test_what_may_not_become_a_path_is_refused(queue, facts, tmp_path):
    with pytest.raises(NameRefused):
        queue.submit(replace(a_job(), **facts))
    with pytest.raises(NameRefused):
        job_folder(Home(tmp_path), "acme", "../../etc")


def test_the_folder_of_a_job_lies_with_its_tenant(tmp_path):
    assert job_folder(Home(tmp_path), "acme", "train_1") == tmp_path / "tenants/acme/jobs/train_1"
    assert job_folder(Home(tmp_path), "default", "train_1") == tmp_path / "jobs/train_1"


def test_a_job_of_another_tenant_is_as_if_it_were_not_there(queue):
    job = queue.submit(a_job())
    calls = [queue.get, queue.request_cancel, queue.pause, queue.resume]
    for call in calls:
        with pytest.raises(NotFound) as other:
            call(job.id, tenant="evil")
        with pytest.raises(NotFound) as missing:
            call("train_ffffffffffff", tenant="evil")
        assert str(other.value).replace(job.id, "X") == str(missing.value).replace("train_ffffffffffff", "X")
    assert queue.get(job.id) == job


def test_jobs_are_listed_newest_first_page_by_page(queue):
    for number in range(5):
        queue.submit(a_job(number))
    queue.submit(a_job(9, tenant="other"))
    first = queue.ls(tenant="acme", limit=2)
    assert [job.name for job in first] == ["bot-4", "bot-3"]
    assert [job.name for job in queue.ls(tenant="acme", limit=9, after=first[-1].id)] == ["bot-2", "bot-1", "bot-0"]
    assert queue.ls(states=("running",)) == []
    with pytest.raises(NotFound):
        queue.ls(tenant="acme", after="train_000000000009")


def test_jobs_of_one_moment_are_listed_once_each(queue):
    for number in range(4):
        queue.submit(replace(a_job(number), created_at=START))
    first = queue.ls(limit=2)
    assert len({job.id for job in first + queue.ls(after=first[-1].id)}) == 4


def test_the_oldest_job_is_claimed_first_and_only_once(queue):
    for number in (1, 0):
        queue.submit(a_job(number))
    job = claim(queue)
    assert (job.name, job.state, job.attempts, job.owner) == ("bot-0", "running", 1, str(ProcessIdentity.mine()))
    assert job.started_at is not None
    assert claim(queue).name == "bot-1"
    assert claim(queue) is None


def test_no_more_than_so_many_run_on_a_machine(queue, db):  # noqa: F811
    for number in range(4):
        queue.submit(a_job(number))
    elsewhere = claim(queue)
    hold(db, elsewhere, owner=ELSEWHERE, lease_until=now() + timedelta(seconds=60))
    assert claim(queue, most_running=2) is not None
    assert claim(queue, most_running=2) is not None
    assert claim(queue, most_running=2) is None


def test_the_tenant_with_the_fewest_running_comes_next(queue):
    for number in range(4):
        queue.submit(a_job(number, tenant="greedy"))
    queue.submit(a_job(8, tenant="modest"))
    queue.submit(a_job(9, tenant="late"))
    assert [claim(queue).tenant for _ in range(6)] == ["greedy", "modest", "late", "greedy", "greedy", "greedy"]


def test_two_jobs_of_one_name_do_not_run_at_once(queue):
    first = queue.submit(a_job(0, name="assistant"))
    queue.submit(a_job(1, name="assistant"))
    queue.submit(a_job(2, tenant="other", name="assistant"))
    held = claim(queue)
    assert held.id == first.id
    assert claim(queue).tenant == "other"
    assert claim(queue) is None
    queue.finish(held, "completed")
    assert claim(queue).id == a_job(1).id


def test_a_job_whose_worker_died_is_taken_over_before_others(queue, db):  # noqa: F811
    queue.submit(a_job(0))
    queue.submit(a_job(1))
    claim(queue)
    late = claim(queue)
    hold(db, late, owner=dead_process())
    queue.submit(a_job(-5))
    again = claim(queue, most_running=2)
    assert (again.id, again.attempts, again.started_at) == (late.id, 2, late.started_at)


def test_a_worker_of_another_machine_is_given_up_when_it_was_silent_for_too_long(queue, db):  # noqa: F811
    job = queue.submit(a_job())
    claim(queue)
    hold(db, job, owner=ELSEWHERE, lease_until=now() + timedelta(seconds=60))
    assert claim(queue) is None
    hold(db, job, lease_until=now() - timedelta(seconds=1))
    assert claim(queue).id == job.id


def test_a_heartbeat_keeps_the_lease_and_tells_what_was_asked_for(queue):
    job = queue.submit(a_job())
    held = claim(queue, seconds=5)
    queue.request_cancel(job.id)
    after = queue.heartbeat(held, seconds=500)
    assert after.lease_until - held.lease_until > timedelta(seconds=400)
    assert (after.phase, after.state) == ("cancelling", "running")


def test_a_job_becomes_one_run_while_it_runs_and_no_other(queue):
    job = queue.submit(a_job())
    with pytest.raises(Conflict, match="not at all any more"):
        queue.note_run(job.id, "bot-20261121_000000")
    held = claim(queue)
    queue.note_run(job.id, "bot-20261121_000000")
    with pytest.raises(Conflict, match="done elsewhere"):
        queue.note_run(job.id, "bot-20261121_000001")
    assert queue.finish(held, "completed").run_id == "bot-20261121_000000"


@pytest.mark.parametrize("lose", ["taken over", "never claimed", "ended"])
def test_whoever_does_not_hold_a_job_cannot_change_it(queue, db, lose):  # noqa: F811
    held = queue.submit(a_job())
    if lose != "never claimed":
        held = claim(queue)
    if lose == "taken over":
        hold(db, held, owner=ELSEWHERE)
    if lose == "ended":
        queue.finish(held, "completed")
    before = queue.get(held.id)
    for work in (
        lambda: queue.heartbeat(held),
        lambda: queue.finish(held, "failed"),
        lambda: queue.release(held),
    ):
        with pytest.raises(Conflict, match="not this worker's any more"):
            work()
    assert queue.get(held.id) == before


def test_a_released_job_waits_for_as_long_as_was_said(queue, db):  # noqa: F811
    queue.submit(a_job())
    job = queue.release(claim(queue), seconds=600, detail="Waits for memory")
    assert (job.state, job.owner, job.lease_until, job.detail) == ("queued", None, None, "Waits for memory")
    assert claim(queue) is None
    hold(db, job, not_before=now() - timedelta(seconds=1))
    again = claim(queue)
    assert (again.id, again.detail, again.not_before) == (job.id, None, None)


def test_a_job_does_not_wait_for_days_because_the_clock_was_put_back(queue, db):  # noqa: F811
    job = queue.submit(a_job())
    hold(db, job, not_before=now() + timedelta(days=2))
    assert claim(queue).id == job.id


@pytest.mark.parametrize("state", ["queued", "paused"])
def test_a_job_that_waits_is_cancelled_at_once(queue, state):
    job = queue.submit(a_job())
    if state == "paused":
        queue.pause(job.id)
    job = queue.request_cancel(job.id)
    assert job.state == "cancelled"
    assert job.finished_at is not None
    assert claim(queue) is None


@pytest.mark.parametrize("state", FINAL_STATES)
@pytest.mark.parametrize("ask", ["request_cancel", "pause", "resume"])
def test_a_job_that_ended_never_changes_again(queue, state, ask):
    job = queue.submit(a_job())
    queue.finish(claim(queue), state, outcome="promoted", candidate="acme/bot-0@20261121_000000")
    before = queue.get(job.id)
    assert (before.state, before.outcome, before.owner) == (state, "promoted", None)
    with pytest.raises(Conflict, match=f"is {state}, so it cannot be"):
        getattr(queue, ask)(job.id)
    assert queue.get(job.id) == before
    assert claim(queue) is None


def test_a_running_job_pauses_when_its_worker_lets_go_and_then_waits_for_resume(queue):
    job = queue.submit(a_job())
    held = claim(queue)
    assert queue.pause(job.id).phase == queue.pause(job.id).phase == "pausing"
    assert queue.release(held).state == "paused"
    assert claim(queue) is None
    assert queue.resume(job.id).state == "queued"
    assert claim(queue).id == job.id
    with pytest.raises(Conflict, match="is running, so it cannot be resumed"):
        queue.resume(job.id)


def test_a_pause_may_be_taken_back_or_become_a_cancel(queue):
    job = queue.submit(a_job())
    claim(queue)
    queue.pause(job.id)
    assert queue.resume(job.id).phase == "running"
    queue.pause(job.id)
    assert queue.request_cancel(job.id).phase == "cancelling"
    assert queue.request_cancel(job.id).phase == "cancelling"
    with pytest.raises(Conflict, match="is cancelling, so it cannot be paused"):
        queue.pause(job.id)


def _claim_all(path, url, gate, found):
    environment = {} if url is None else {"DATABASE_URL": url}  # noqa: F811
    with Database(Home(path), env=environment).connect() as database:
        queue = JobQueue(database)
        gate.wait()
        while (job := queue.claim(most_running=1000)) is not None:
            found.put(job.id)
            queue.finish(job, "completed")


def test_many_workers_claim_each_job_once(db, environment, tmp_path):  # noqa: F811
    queue = JobQueue(db)
    for number in range(40):
        queue.submit(a_job(number, tenant=f"t{number % 3}"))
    spawn = multiprocessing.get_context("spawn")
    gate, found = spawn.Barrier(3), spawn.Queue()
    arguments = (tmp_path / "home", environment.get("DATABASE_URL"), gate, found)
    workers = [spawn.Process(target=_claim_all, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    claimed = [found.get(timeout=120) for _ in range(40)]
    for worker in workers:
        worker.join()
    assert len(set(claimed)) == 40
    assert found.empty()
    assert [(job.state, job.attempts) for job in queue.ls()] == [("completed", 1)] * 40


def test_a_worker_killed_anywhere_in_a_claim_or_a_finish_loses_no_job(tmp_path):
    home = Home(tmp_path / "home")
    JobQueue(home.database).submit(a_job())
    home.database.close()

    def work():
        queue = JobQueue(Home(tmp_path / "home").database)
        queue.finish(queue.claim(most_running=1), "completed")

    for _ in kill_everywhere(work):
        connection = sa.create_engine(f"sqlite:///{home.state_db}").connect()
        rows = connection.execute(sa.select(jobs.c.state, jobs.c.attempts)).all()
        connection.close()
        assert len(rows) == 1
        assert rows[0].state in ("queued", "running")
    assert JobQueue(home.database).get(a_job().id).state == "completed"


def beside(queue, job, most=15, may_join=lambda _: True):
    return [one.id for one in queue.claim_beside(job, most=most, may_join=may_join)]


def test_those_that_share_a_base_are_taken_fairly_and_never_two_of_one_name(queue, db):  # noqa: F811
    Tenants(db).add("small", Quota(running_trainings=1), by="test")
    mine = [queue.submit(a_job(number, tenant="acme")) for number in range(4)]
    same_name = queue.submit(a_job(4, tenant="acme", name="bot-1"))
    small = [queue.submit(a_job(number, tenant="small")) for number in (5, 6)]
    zoo = queue.submit(a_job(7, tenant="zoo"))
    other = queue.submit(replace(a_job(8, tenant="zoo"), root="/elsewhere", recipe={"method": "lora", "base": "./x"}))
    first = claim(queue)
    assert first.id == mine[0].id
    together = beside(queue, first, most=4)
    assert together[0] == first.id
    assert set(together[1:]) == {small[0].id, zoo.id, mine[1].id, mine[2].id}, "who has fewest comes next"
    groups = {queue.get(job_id).group_id for job_id in together}
    assert len(groups) == 1
    assert None not in groups
    assert {queue.get(job_id).state for job_id in together} == {"running"}
    # With room for one more on the machine: the group counts as one.
    assert claim(queue, most_running=1) is None
    assert claim(queue, most_running=2).id == other.id
    assert {job.id for job in queue.ls(states=("queued",))} == {mine[3].id, same_name.id, small[1].id}


def test_whoever_finds_nobody_to_share_with_is_no_group(queue):
    queue.submit(a_job(0))
    queue.submit(a_job(1, tenant="zoo"))
    first = claim(queue)
    assert beside(queue, first, may_join=lambda _: False) == beside(queue, first, most=0) == [first.id]
    assert queue.get(first.id).group_id is None


def test_a_group_is_left_at_the_end_and_taken_over_as_one(queue, db):  # noqa: F811
    for number in range(3):
        queue.submit(a_job(number, tenant=f"t{number}"))
    first, second, third = (queue.get(job_id) for job_id in beside(queue, claim(queue)))
    assert queue.finish(second, "completed").group_id is None
    assert queue.release(third).group_id is None
    queue.submit(a_job(3, tenant="t3"))
    for job in (first,):
        hold(db, job, owner=dead_process())
    again = claim(queue)
    assert (again.id, again.attempts) == (first.id, 2)
    assert set(beside(queue, again)) == {first.id, third.id, a_job(3).id}
    with pytest.raises(Conflict, match="not this worker's any more"):
        beside(queue, replace(first, owner=ELSEWHERE))


def test_the_members_of_a_group_that_lost_its_worker_are_taken_over_though_the_machine_is_full(queue, db):  # noqa: F811
    for number in range(3):
        queue.submit(a_job(number, tenant=f"t{number}"))
    together = beside(queue, claim(queue))
    lost = [queue.get(job_id) for job_id in together]
    for job in lost:
        hold(db, job, owner=dead_process())
    queue.submit(a_job(5, tenant="t5"))
    assert [claim(queue, most_running=1).id for _ in together] == together
    assert claim(queue, most_running=1) is None
