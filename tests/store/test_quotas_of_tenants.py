"""What tenants may use, in the database and in the queue, and what is left when one is removed."""

import os

import pytest
import sqlalchemy as sa

from nightschool.errors import Conflict, NameRefused, NotFound, QuotaExceeded, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder, new_id
from nightschool.store.registry import Registry
from nightschool.store.tables import metadata
from nightschool.store.tenant_removal import belongings, remove_tenant
from nightschool.store.tenants import UNBOUNDED, Quota, Tenants, Usage, tables_of_tenants
from tests.support.cli_home import add_version, make_run
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401


@pytest.fixture
def home(db):  # noqa: F811
    home = db.home
    home.__dict__["database"] = db
    return home.ensure()


def job(tenant="acme", name="bot"):
    return Job(new_id(), tenant, name, {}, "/", "api")


def test_bounds_are_kept_and_changed_one_by_one(db):  # noqa: F811
    tenants = Tenants(db)
    assert tenants.quota("acme") == UNBOUNDED
    tenants.add("acme", Quota(requests_per_minute=0.5), by="test")
    with pytest.raises(Conflict, match="added before"):
        tenants.add("acme", UNBOUNDED, by="test")
    assert tenants.set("acme", {"tokens_per_day": 10}, by="test") == Quota(requests_per_minute=0.5, tokens_per_day=10)
    assert tenants.set("acme", {"requests_per_minute": None}, by="test") == Quota(tokens_per_day=10)
    assert tenants.set("new", {"open_trainings": 0}, by="test") == tenants.quota("new") == Quota(open_trainings=0)
    assert tenants.known() == {"acme", "new"}
    for wrong in (-1, float("nan"), float("inf"), 0):
        with pytest.raises(UsageError, match="requests_per_minute"):
            tenants.set("acme", {"requests_per_minute": wrong}, by="test")
    with pytest.raises(NameRefused):
        tenants.add("../acme", UNBOUNDED, by="test")


def test_use_adds_up_by_day(db):  # noqa: F811
    tenants = Tenants(db)
    for _ in range(2):
        tenants.count({("acme", "2026-11-26"): Usage(1, 10, 5), ("acme", "2026-11-27"): Usage(1, 1, 1)})
    assert tenants.used("acme", "2026-11-26") == Usage(2, 20, 10)
    assert tenants.used("acme", "2026-11-28") == tenants.used("other", "2026-11-26") == Usage()


def test_a_tenant_may_have_so_many_open_jobs(home):
    queue = JobQueue(home.database)
    Tenants(home.database).set("acme", {"open_trainings": 2}, by="test")
    first = queue.submit(job())
    queue.submit(job())
    with pytest.raises(QuotaExceeded, match="2 jobs that wait or run, and may have 2") as caught:
        queue.submit(job())
    assert caught.value.retry_after_seconds > 0
    assert caught.value.http_status == 429
    queue.submit(job("other"))
    queue.request_cancel(first.id)
    queue.submit(job())


def test_a_tenant_may_run_so_many_at_once_and_holds_up_nobody(home):
    queue = JobQueue(home.database)
    Tenants(home.database).set("acme", {"running_trainings": 1}, by="test")
    for name in ("a", "b"):
        queue.submit(job(name=name))
    other = queue.submit(job("other"))
    claimed = [queue.claim(most_running=9) for _ in range(3)]
    assert [one.tenant if one else None for one in claimed] == ["acme", "other", None]
    assert claimed[1].id == other.id
    queue.finish(claimed[0], "completed")
    assert queue.claim(most_running=9).name == "b"


def test_a_tenant_may_store_so_many_versions(home):
    Tenants(home.database).set("acme", {"stored_versions": 1}, by="test")
    queue = JobQueue(home.database)
    queue.submit(job())
    add_version(home, name="acme/bot")
    with pytest.raises(QuotaExceeded, match="1 published versions, and may have 1"):
        queue.submit(job())


def fill(home, tenant):
    """Something of every kind. Returns its key."""
    name = f"{tenant}/bot"
    add_version(home, name=name)
    make_run(home, name=name)
    Pins(home.database).add(name, "q", "a")
    store = ConversationStore(home.database)
    store.record(f"{tenant}-1", name, "v", [{"role": "user", "content": "hi"}], "hello")
    store.feedback(f"{tenant}-1", "good")
    queued = JobQueue(home.database).submit(job(tenant))
    job_folder(home, tenant, queued.id).mkdir(parents=True)
    Tenants(home.database).set(tenant, {"tokens_per_day": 1}, by="test")
    Tenants(home.database).count({(tenant, "2026-11-26"): Usage(1, 1, 1)})
    return ApiKeys(home.database).create(tenant, by="test")[0]


def rows_that_say(home, text):
    with home.database.read() as connection:
        return {
            table.name
            for table in metadata.sorted_tables
            for row in connection.execute(sa.select(table))
            if text in repr(tuple(row))
        }


def test_nothing_of_a_removed_tenant_is_left_but_what_was_done_to_it(home):
    key, other = fill(home, "acme"), fill(home, "acme2")
    before = rows_that_say(home, "acme2")
    found = belongings(home, "acme")
    assert found.active_keys == 1
    assert found.size_bytes > 0
    assert remove_tenant(home, "acme", by="cli:ada") == found
    assert {"conversations", "jobs", "pins", "usage", "tenants"} <= found.rows.keys()
    assert not (home.tenants / "acme").exists()
    assert rows_that_say(home, "'acme'") <= {"audit_log", "api_keys"}
    assert ApiKeys(home.database).get(key.id).revoked_at is not None
    assert AuditLog(home.database).ls(limit=1)[0].action == "tenant.delete"
    assert rows_that_say(home, "acme2") == before
    assert ApiKeys(home.database).get(other.id).revoked_at is None
    assert Registry(home).names() == ["acme2/bot"]
    with pytest.raises(NotFound, match="There is no tenant 'acme'"):
        remove_tenant(home, "acme", by="cli:ada")


def test_every_table_that_knows_tenants_is_swept():
    with_tenant = {table.name for table in metadata.sorted_tables if "tenant" in table.c}
    assert {table.name for table in tables_of_tenants()} == with_tenant - {"audit_log", "api_keys"}


def test_a_tenant_at_work_or_underneath_another_stays(home):
    base = add_version(home, name="acme/base")
    other = add_version(home, name="other/bot", kind="adapter", base=base.ref)
    with pytest.raises(Conflict, match=f"{base.ref} is the base of {other.ref}"):
        remove_tenant(home, "acme", by="test")
    assert Registry(home).names("acme") == ["acme/base"]
    running = make_run(home, name="busy/bot")
    running.update_status(state="running", pid=os.getpid())
    with pytest.raises(Conflict, match="is running"):
        remove_tenant(home, "busy", by="test")
    with pytest.raises(Conflict, match="default tenant"):
        remove_tenant(home, "default", by="test")
    with pytest.raises(NameRefused):
        remove_tenant(home, "../acme", by="test")


def test_a_removal_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    home = Home(tmp_path / "home").ensure()
    fill(home, "acme")
    from nightschool.store import tenant_removal

    def fail(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(tenant_removal, "remove_folder", fail)
        with pytest.raises(KeyboardInterrupt):
            remove_tenant(home, "acme", by="test")
    assert (home.tenants / "acme").exists()
    remove_tenant(home, "acme", by="test")
    assert not (home.tenants / "acme").exists()
