"""`client.webhooks` of OpenAI's client against a live server, and who may see what."""

from __future__ import annotations

import openai
import pytest

from nightschool.store.home import Home
from nightschool.store.principal import SCOPES
from nightschool.store.registry import Registry
from nightschool.webhooks.address import HOSTS_VARIABLE
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live
from tests.support.webhook_receiver import receiving

ACME, OTHER = "acme-key-1", "other-key-1"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")
    keys = [{"key": ACME, "tenant": "acme", "scopes": SCOPES}, {"key": OTHER, "tenant": "other", "scopes": SCOPES}]
    with live(FakeSlot(), registry=Registry(Home(tmp_path).ensure()), api_keys=keys) as one:
        yield one


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=ACME, max_retries=0) as one:
        yield one


@pytest.fixture
def receiver():
    with receiving() as one:
        yield one


def make(client, receiver, name="ours", event_types=("fine_tuning.job.succeeded",)):
    return client.webhooks.create(name=name, url=receiver.url, event_types=list(event_types))


def test_an_endpoint_from_its_making_to_its_end(client, receiver):
    made = make(client, receiver)
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint.endswith(made.signing_secret[-4:])
    found = client.webhooks.retrieve(made.id)
    assert (found.name, found.url, found.event_types) == ("ours", receiver.url, ["fine_tuning.job.succeeded"])
    assert not hasattr(found, "signing_secret")
    changed = client.webhooks.update(made.id, name="theirs", event_types=["fine_tuning.job.failed"])
    assert (changed.name, changed.url, changed.event_types) == ("theirs", receiver.url, ["fine_tuning.job.failed"])
    new = client.webhooks.rotate_secret(made.id)
    assert new.signing_secret != made.signing_secret
    gone = client.webhooks.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    with pytest.raises(openai.NotFoundError, match="no webhook endpoint"):
        client.webhooks.retrieve(made.id)


def test_a_test_sends_a_made_up_event_now_that_the_secret_verifies(client, receiver):
    made = make(client, receiver)
    receiver.answers = [202]
    result = client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert (result.status_code, result.success) == (202, True)
    [(headers, body)] = receiver.received
    assert client.webhooks.unwrap(body, headers, secret=made.signing_secret).type == "fine_tuning.job.failed"


def test_a_test_of_a_place_where_nobody_is_says_so(client, receiver):
    made = client.webhooks.create(name="x", url="http://127.0.0.1:1/", event_types=["fine_tuning.job.failed"])
    with pytest.raises(openai.BadRequestError, match="did not answer"):
        client.webhooks.test(made.id, event_type="fine_tuning.job.failed")


def test_pages_are_newest_first(client, receiver):
    made = [make(client, receiver, name=f"n{number}").id for number in range(5)]
    assert [one.id for one in client.webhooks.list(limit=2)] == made[::-1]
    first = client.webhooks.list(limit=2)
    assert first.has_more
    with pytest.raises(openai.NotFoundError):
        client.webhooks.list(after="wh_none")


def test_another_tenant_sees_nothing_and_changes_nothing(server, client, receiver):
    made = make(client, receiver)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=OTHER, max_retries=0) as other:
        assert list(other.webhooks.list()) == []
        for attempt in (
            lambda: other.webhooks.retrieve(made.id),
            lambda: other.webhooks.update(made.id, name="mine"),
            lambda: other.webhooks.rotate_secret(made.id),
            lambda: other.webhooks.test(made.id, event_type="fine_tuning.job.failed"),
            lambda: other.webhooks.delete(made.id),
            lambda: other.webhooks.list(after=made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                attempt()
    assert client.webhooks.retrieve(made.id).name == "ours"


@pytest.mark.parametrize("url", ["http://example.org/", "https://169.254.169.254/latest", "https://localhost/", "x"])
def test_an_address_that_webhooks_may_not_go_to_is_refused_at_once(client, url):
    with pytest.raises(openai.BadRequestError, match="Nothing can be sent"):
        client.webhooks.create(name="x", url=url, event_types=["fine_tuning.job.failed"])


def test_an_event_that_never_happens_here_is_refused(client, receiver):
    with pytest.raises(openai.BadRequestError, match=r"event_types.*fine_tuning\.job\.succeeded"):
        make(client, receiver, event_types=["batch.completed"])
    assert "model.promoted" in client.webhooks.event_types.list().data
