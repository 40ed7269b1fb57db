"""Events reach whoever asked for them: signed, once each, again after failures, and nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import openai
import pytest
from standardwebhooks.webhooks import Webhook

from nightschool.errors import Conflict, NotFound
from nightschool.events import now
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.outbox import announce
from nightschool.store.tables import webhook_deliveries
from nightschool.webhooks import deliveries as module
from nightschool.webhooks.address import HOSTS_VARIABLE
from nightschool.webhooks.deliverer import Deliverer
from nightschool.webhooks.deliveries import PAUSES_SECONDS, Deliveries
from nightschool.webhooks.endpoints import MOST_ENDPOINTS, Endpoints
from tests.support.live_server import eventually
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401
from tests.support.webhook_receiver import receiving

JOB_ENDS = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@pytest.fixture(autouse=True)
def own_network(monkeypatch):
    monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")


@pytest.fixture
def receiver():
    with receiving() as one:
        yield one


def endpoint_of(db, receiver, tenant="acme", event_types=JOB_ENDS):  # noqa: F811
    return Endpoints(db).create(tenant, name="ours", url=receiver.url, event_types=event_types)


def tell(db, tenant="acme", event_type="fine_tuning.job.succeeded", key="train_1", **data):  # noqa: F811
    with db.write() as connection:
        announce(connection, tenant, event_type, {"id": key} | data, key=key)


def deliver_all(db):  # noqa: F811
    """Let a deliverer send what is due, until nothing is."""
    deliverer = Deliverer(db, look_seconds=0.01).start()
    try:
        eventually(lambda: not [one for one in Deliveries(db).ls(states=["pending"]) if one.next_try_at <= now()])
    finally:
        deliverer.stop()


def due_now(db):  # noqa: F811
    with db.write() as connection:
        connection.execute(webhook_deliveries.update().values(next_try_at=now() - timedelta(seconds=1)))


def test_an_event_arrives_signed_and_the_client_of_openai_unwraps_it(db, receiver):  # noqa: F811
    endpoint = endpoint_of(db, receiver)
    tell(db)
    deliver_all(db)
    [(headers, body)] = receiver.received
    event = openai.OpenAI(api_key="-", webhook_secret=endpoint.secret).webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", "train_1")
    assert headers["webhook-id"] == event.id
    [delivery] = Deliveries(db).ls()
    assert (delivery.state, delivery.attempts, delivery.status_code) == ("delivered", 1, 200)


def test_only_whoever_asked_for_it_is_told(db, receiver):  # noqa: F811
    endpoint_of(db, receiver, event_types=["model.promoted"])
    endpoint_of(db, receiver, tenant="other")
    tell(db)
    assert Deliveries(db).ls() == []


def test_the_same_event_entered_twice_is_sent_once(db, receiver):  # noqa: F811
    endpoint_of(db, receiver)
    tell(db)
    deliver_all(db)
    tell(db)
    tell(db, key="train_2")
    deliver_all(db)
    assert sorted(json.loads(body)["data"]["id"] for _, body in receiver.received) == ["train_1", "train_2"]


def test_what_fails_is_tried_again_with_longer_pauses_and_then_given_up(db, receiver):  # noqa: F811
    endpoint_of(db, receiver)
    receiver.answers = [500]
    tell(db)
    pauses = []
    for _ in PAUSES_SECONDS:
        deliver_all(db)
        [delivery] = Deliveries(db).ls()
        pauses.append((delivery.next_try_at - now()).total_seconds())
        due_now(db)
    assert all(pause > wanted - 30 for pause, wanted in zip(pauses, PAUSES_SECONDS, strict=True))
    deliver_all(db)
    [delivery] = Deliveries(db).ls()
    assert (delivery.state, delivery.attempts, delivery.error) == ("failed", len(PAUSES_SECONDS) + 1, "answered 500")
    receiver.answers = [204]
    assert Deliveries(db).retry(delivery.event_id) == 1
    deliver_all(db)
    assert Deliveries(db).ls()[0].state == "delivered"
    with pytest.raises(NotFound, match="did not take"):
        Deliveries(db).retry(delivery.event_id)


def test_each_attempt_is_signed_anew_under_the_id_of_the_event(db, receiver):  # noqa: F811
    endpoint = endpoint_of(db, receiver)
    receiver.answers = [503, 200]
    receiver.answer_headers = {"Retry-After": "3600"}
    tell(db)
    deliver_all(db)
    [delivery] = Deliveries(db).ls()
    assert (delivery.next_try_at - now()).total_seconds() > 3000
    due_now(db)
    deliver_all(db)
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    for headers, body in receiver.received:
        Webhook(endpoint.secret).verify(body, headers)


def test_a_redirect_is_not_followed(db, receiver):  # noqa: F811
    endpoint_of(db, receiver)
    receiver.answers = [307]
    receiver.answer_headers = {"Location": receiver.url}
    tell(db)
    deliver_all(db)
    [delivery] = Deliveries(db).ls()
    assert len(receiver.received) == 1
    assert delivery.error == "answered 307, and redirects are not followed"


def test_an_address_that_was_allowed_once_is_looked_at_again_before_sending(db, receiver, monkeypatch):  # noqa: F811
    endpoint_of(db, receiver)
    monkeypatch.delenv(HOSTS_VARIABLE)
    tell(db)
    deliver_all(db)
    assert receiver.received == []
    assert "https://" in str(Deliveries(db).ls()[0].error)


def test_an_endpoint_that_is_gone_is_told_nothing_more_until_it_is_changed(db, receiver):  # noqa: F811
    endpoint = endpoint_of(db, receiver)
    receiver.answers = [410, 200]
    tell(db)
    deliver_all(db)
    tell(db, key="train_2")
    assert [one.state for one in Deliveries(db).ls()] == ["failed"]
    Endpoints(db).update("acme", endpoint.id, name="back again")
    tell(db, key="train_3")
    deliver_all(db)
    assert json.loads(receiver.received[-1][1])["data"]["id"] == "train_3"


def test_after_a_change_of_the_secret_both_sign_for_a_day_if_that_is_wanted(db, receiver):  # noqa: F811
    endpoints = Endpoints(db)
    old = endpoint_of(db, receiver)
    both = endpoints.rotate_secret("acme", old.id, keep_old=True)
    tell(db)
    deliver_all(db)
    headers, body = receiver.received[0]
    for secret in (old.secret, both.secret):
        Webhook(secret).verify(body, headers)
    new = endpoints.rotate_secret("acme", old.id, keep_old=False)
    assert new.signing_secrets(now()) == [new.secret]
    assert both.signing_secrets(now() + timedelta(hours=25)) == [both.secret]


def test_a_slow_endpoint_holds_up_no_other(db, receiver):  # noqa: F811
    with receiving() as slow:
        slow.may_answer.clear()
        endpoint_of(db, slow)
        endpoint_of(db, receiver)
        for number in range(5):
            tell(db, key=f"train_{number}")
        deliverer = Deliverer(db, look_seconds=0.01).start()
        eventually(lambda: receiver.received and slow.received)
        slow.may_answer.set()
        eventually(lambda: len(receiver.received) == len(slow.received) == 5)
        deliverer.stop()


def test_what_a_process_has_taken_is_its_own_until_it_dies(db, environment, receiver, tmp_path):  # noqa: F811
    endpoint_of(db, receiver)
    tell(db)
    code = (
        "import sys, pathlib; from nightschool.store.home import Home; from nightschool.webhooks.deliveries import Deliveries;"
        "print(len(Deliveries(Home(pathlib.Path(sys.argv[1])).database).claim()), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(db._home.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    assert other.stdout.readline() == b"1\n"
    assert Deliveries(db).claim() == []
    other.kill()
    other.communicate()
    assert len(Deliveries(db).claim()) == 1


def test_what_another_process_has_taken_is_left_to_it(db, receiver, monkeypatch):  # noqa: F811
    endpoint_of(db, receiver)
    tell(db)
    with db.write() as connection:
        until = now() + timedelta(seconds=60)
        connection.execute(webhook_deliveries.update().values(owner="elsewhere:1:1.00", lease_until=until))
    assert Deliveries(db).claim() == []
    monkeypatch.setattr(module, "now", lambda: until + timedelta(seconds=1))
    assert len(Deliveries(db).claim()) == 1


def test_deleting_an_endpoint_takes_what_waits_for_it_along(db, receiver):  # noqa: F811
    endpoint = endpoint_of(db, receiver)
    tell(db)
    with pytest.raises(NotFound):
        Endpoints(db).delete("other", endpoint.id)
    Endpoints(db).delete("acme", endpoint.id)
    assert Deliveries(db).ls() == []


def test_a_tenant_has_a_bounded_number_of_endpoints(db, receiver):  # noqa: F811
    for _ in range(MOST_ENDPOINTS):
        endpoint_of(db, receiver)
    with pytest.raises(Conflict, match="Delete one first"):
        endpoint_of(db, receiver)
    endpoint_of(db, receiver, tenant="other")


def test_what_was_finished_long_ago_is_forgotten(db, receiver, monkeypatch):  # noqa: F811
    endpoint_of(db, receiver)
    tell(db)
    deliver_all(db)
    monkeypatch.setattr(module, "now", lambda: now() + module.KEPT + timedelta(days=1))
    Deliveries(db).sweep()
    assert Deliveries(db).ls() == []


def job(number):
    return Job(id=f"train_{number}", tenant="acme", name="assistant", recipe={}, root="/", source="api")


def test_each_end_of_a_job_is_told_once(db, receiver):  # noqa: F811
    endpoint_of(db, receiver)
    queue = JobQueue(db)
    for number in range(3):
        queue.submit(job(number))
    queue.request_cancel("train_2")
    for state, facts in (("completed", {"outcome": "promoted", "candidate": "20260101_000000"}), ("failed", {})):
        claimed = queue.claim(most_running=5)
        queue.finish(claimed, state, **facts)
    deliver_all(db)
    events = [json.loads(body) for _, body in receiver.received]
    assert {(one["data"]["id"], one["type"]) for one in events} == {
        ("train_0", "fine_tuning.job.succeeded"),
        ("train_1", "fine_tuning.job.failed"),
        ("train_2", "fine_tuning.job.cancelled"),
    }
    done = next(one["data"] for one in events if one["type"] == "fine_tuning.job.succeeded")
    assert done == {"id": "train_0", "model": "acme/assistant", "version": "20260101_000000", "outcome": "promoted"}
