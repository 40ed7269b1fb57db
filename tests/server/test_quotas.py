"""Bounds of tenants on a server that runs: 429, when to come again, and OpenAI's headers."""

import re

import pytest

from nightschool.server.middleware.quotas import written_duration
from nightschool.store.api_keys import ApiKeys
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.tenants import Quota, Tenants, Usage, day_of
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually

ASK = {"query": "a"}
ANSWER_TOKENS = len("Hello, wörld!".encode())


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    with Database(home).connect() as database:
        home.__dict__["database"] = database
        yield home


@pytest.fixture
def tenants(home):
    return Tenants(home.database)


@pytest.fixture
def client(home):
    with client_of([FakeSlot(), FakeSlot("acme/bot")], registry=Registry(home)) as client:
        yield client


def key_of(home, tenant="acme"):
    return {"x-api-key": ApiKeys(home.database).create(tenant, by="test")[1]}


def used_today(tenants, tenant):
    from nightschool.events import now

    return tenants.used(tenant, day_of(now()))


def test_the_rate_of_a_tenant_is_that_of_all_its_keys(home, tenants, client):
    tenants.add("acme", Quota(requests_per_minute=2), by="test")
    first, second, other = key_of(home), key_of(home), key_of(home, "default")
    answer = client.post("/generate", json=ASK, headers=first)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert answer.headers["x-ratelimit-reset-requests"] == "30s"
    assert client.get("/v1/models", headers=second).status_code == 200
    refused = client.post("/v1/chat/completions", json={}, headers=second)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "this tenant" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    unbounded = client.post("/generate", json=ASK, headers=other)
    assert unbounded.status_code == 200
    assert "x-ratelimit-limit-requests" not in unbounded.headers
    assert client.get("/healthz").status_code == 200


def test_a_refused_request_takes_nothing_from_the_bucket_of_the_key(home, tenants):
    tenants.set("acme", {"requests_per_minute": 1}, by="test")
    settings = {"requests_per_minute": 600, "request_burst": 5, "registry": Registry(home)}
    with client_of([FakeSlot("acme/bot")], **settings) as client:
        key = key_of(home)
        statuses = [client.post("/generate", json=ASK, headers=key).status_code for _ in range(8)]
        assert statuses == [200] + [429] * 7
        tenants.set("acme", {"requests_per_minute": None}, by="test")
        eventually(lambda: client.get("/v1/models", headers=key).status_code == 200)


def test_tokens_are_counted_and_end_for_the_day(home, tenants, client):
    key = key_of(home)
    assert client.post("/generate", json=ASK, headers=key).status_code == 200
    used = eventually(lambda: used_today(tenants, "acme").generated_tokens and used_today(tenants, "acme"))
    assert (used.requests, used.generated_tokens) == (1, ANSWER_TOKENS)
    assert used.prompt_tokens > 0
    tenants.set("acme", {"tokens_per_day": ANSWER_TOKENS + 1}, by="test")
    left = eventually(
        lambda: client.post("/generate", json=ASK, headers=key).headers.get("x-ratelimit-remaining-tokens")
    )
    assert int(left) <= 1
    refused = eventually(
        lambda: (answer := client.post("/generate", json=ASK, headers=key)).status_code == 429 and answer
    )
    assert "tokens generated a day" in refused.json()["detail"]
    assert 0 < int(refused.headers["retry-after"]) <= 24 * 3600
    assert refused.headers["x-ratelimit-limit-tokens"] == str(ANSWER_TOKENS + 1)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert re.fullmatch(r"(\d+h)?(\d+m)?\d+s", refused.headers["x-ratelimit-reset-tokens"])
    assert client.get("/v1/models", headers=key).status_code == 200, "what generates nothing is not bounded"


def test_a_streamed_answer_is_counted_as_the_others_are(home, tenants, client):
    chat = {"model": "bot", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert client.post("/v1/chat/completions", json=chat, headers=key_of(home)).status_code == 200
    used = eventually(lambda: used_today(tenants, "acme").generated_tokens and used_today(tenants, "acme"))
    assert used.generated_tokens == ANSWER_TOKENS


def test_what_could_not_be_written_is_counted_and_written_later(home, tenants, client, monkeypatch):
    key, count, failures = key_of(home), Tenants.count, []

    def fail_once(self, used):
        if not failures:
            failures.append(dict(used))
            raise OSError("no room")
        count(self, used)

    monkeypatch.setattr(Tenants, "count", fail_once)
    assert client.post("/generate", json=ASK, headers=key).status_code == 200
    eventually(lambda: failures)
    assert client.post("/generate", json=ASK, headers=key).status_code == 200
    eventually(lambda: used_today(tenants, "acme").requests == 2)
    assert used_today(tenants, "acme").generated_tokens == 2 * ANSWER_TOKENS


def test_what_is_left_is_written_when_the_server_stops(home, tenants):
    with client_of([FakeSlot("acme/bot")], registry=Registry(home)) as client:
        assert client.post("/generate", json=ASK, headers=key_of(home)).status_code == 200
    assert used_today(tenants, "acme") == Usage(1, used_today(tenants, "acme").prompt_tokens, ANSWER_TOKENS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.2, "1s"), (360, "6m0s"), (86399, "23h59m59s"), (3600, "1h0m0s")]
)
def test_durations_are_written_as_openai_does(seconds, text):
    assert written_duration(seconds) == text
