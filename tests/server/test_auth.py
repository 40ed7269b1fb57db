"""Who may ask: keys, browsers, rates, and addresses."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from nightschool.errors import NameRefused, NotFound, UsageError
from nightschool.server.app import create_app, routes_of
from nightschool.server.metrics import Metrics
from nightschool.server.middleware.auth import Guard
from nightschool.server.middleware.buckets import Rate, Room, TokenBuckets
from nightschool.server.middleware.keyring import Keyring
from nightschool.server.middleware.request_log import Access
from nightschool.server.middleware.route_rules import RULES, RouteTable, rule_of
from nightschool.server.settings import ApiKey, ServerSettings, read_api_keys
from nightschool.store.principal import SCOPES
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of

KEYS = (SecretStr("first-key-of-two"), SecretStr("second-key-of-two"))
ASK = {"query": "a"}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key-of-two"},
        {"authorization": "bearer second-key-of-two"},
        {"x-api-key": "second-key-of-two"},
    ],
)
def test_either_key_in_either_header_opens(headers):
    with client_of(FakeSlot(), api_keys=KEYS) as client:
        assert client.post("/generate", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer first-key-of-tw"},
        {"authorization": "Basic first-key-of-two"},
        {"authorization": "first-key-of-two"},
        {"x-api-key": "first-key-of-two, second-key-of-two"},
        {"x-api-key": b"\xff\xfe"},
    ],
)
def test_no_key_or_a_wrong_one_is_401_in_the_spelling_of_the_family(headers):
    with client_of(FakeSlot(), api_keys=KEYS) as client:
        plain = client.post("/generate", json=ASK, headers=headers)
        assert plain.status_code == 401
        assert "API key" in plain.json()["detail"]
        assert plain.headers["www-authenticate"] == "Bearer"
        openai = client.post("/v1/chat/completions", json={}, headers=headers)
        assert openai.status_code == 401
        assert openai.json()["error"]["code"] == "invalid_api_key"
        problem = client.post("/api/feedback", json={}, headers=headers)
        assert problem.status_code == 401
        assert problem.headers["content-type"] == "application/problem+json"
        assert "first-key-of-tw" not in plain.text


def test_only_health_is_open_and_metrics_on_loopback():
    with client_of(FakeSlot(), api_keys=KEYS) as client:
        for path in ("/healthz", "/readyz", "/health", "/metrics"):
            assert client.get(path).status_code == 200
        for path in ("/model_info", "/refresh_model", "/openapi.json", "/docs", "/api/settings", "/v1/models", "/nope"):
            assert client.get(path).status_code == 401
    with client_of(FakeSlot(), api_keys=KEYS, host="0.0.0.0") as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"x-api-key": "first-key-of-two"}).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
def test_a_page_of_another_origin_changes_nothing(headers):
    slot = FakeSlot()
    with client_of(slot) as client:
        refreshes = slot.refreshes
        assert client.post("/generate", json=ASK, headers=headers).status_code == 403
        assert client.post("/v1/chat/completions", json={}, headers=headers).status_code == 403
        assert client.get("/refresh_model", headers=headers).status_code == 403
        assert client.post("/refresh_model", headers=headers).status_code == 403
        assert slot.refreshes == refreshes
        assert "access-control-allow-origin" not in client.get("/health", headers=headers).headers


def test_a_page_of_the_same_origin_may_ask():
    with client_of(FakeSlot()) as client:
        headers = {"origin": "http://127.0.0.1:8001", "sec-fetch-site": "same-origin"}
        assert client.post("/generate", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_form_can_send_without_asking_is_no_json(kind):
    with client_of(FakeSlot()) as client:
        answer = client.post("/generate", content=b'{"query": "a"}', headers={"content-type": kind})
        assert answer.status_code == 422


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8001", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8001", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8001", 403),
        ("192.168.0.7", 403),
        ("", 403),
        ("[::1].evil", 403),
        ("proxy.example:443", 200),
    ],
)
def test_a_rebound_name_does_not_reach_a_loopback_server(host, status):
    with client_of(FakeSlot(), allowed_hosts=("proxy.example",)) as client:
        assert client.get("/model_info", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("bot.example:8001", 200),
        ("localhost:8001", 200),
        (f"{socket.gethostname()}:8001", 200),
        ("192.168.0.7:8001", 200),
        ("[fd00::7]:8001", 200),
        ("evil.example", 403),
        ("192.168.0.7.evil.example", 403),
        ("", 403),
    ],
)
def test_with_keys_the_host_is_an_address_or_a_name_of_this_server(host, status):
    with client_of(FakeSlot(), api_keys=KEYS, host="0.0.0.0", allowed_hosts=("bot.example",)) as client:
        for path in ("/model_info", "/healthz"):
            answer = client.get(path, headers={"host": host, "x-api-key": "first-key-of-two"})
            assert answer.status_code == status
            assert status == 200 or "--allowed-hosts" in answer.json()["detail"]


def test_every_host_is_taken_only_where_there_are_keys():
    with client_of(FakeSlot(), api_keys=KEYS, allowed_hosts=("*",)) as client:
        headers = {"host": "bot.example", "x-api-key": "first-key-of-two"}
        assert client.get("/model_info", headers=headers).status_code == 200
    with pytest.raises(UsageError, match="NIGHTSCHOOL_API_KEY"):
        ServerSettings(allowed_hosts=("*",)).check()


@pytest.mark.parametrize("origin", ["http://[::1", "http://[", "http://]", "//", "http://[::1]:x", "\xff"])
def test_an_origin_that_is_no_address_is_a_foreign_one(origin):
    with client_of(FakeSlot()) as client:
        answer = client.post("/generate", json=ASK, headers={"origin": origin.encode("latin-1")})
        assert answer.status_code == 403
        assert answer.json()["detail"].startswith("A page of another origin")


def test_wrong_keys_are_counted_against_the_address_whatever_the_rate_is():
    now = 0.0
    settings = ServerSettings(api_keys=KEYS)
    app, keyring = create_app([FakeSlot()], settings), Keyring(settings, None, ThreadPoolExecutor(1))
    guard = Guard(app, settings=settings, keyring=keyring, clock=lambda: now)
    access = Access(guard, metrics=Metrics(lambda: None), routes=RouteTable([]))
    with TestClient(access, "http://127.0.0.1") as client:

        def asked(key: str) -> int:
            return client.get("/api/settings", headers={"x-api-key": key}).status_code

        assert asked("first-key-of-two") == 200
        assert [asked(f"guess-{number}") for number in range(12)] == [401] * 10 + [429] * 2
        refused = client.get("/v1/models", headers={"x-api-key": "guess-again"})
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "6"
        assert asked("second-key-of-two") == 429, "else a guesser sees which guess was right"
        assert asked("first-key-of-two") == 200, "whoever opened from here before is not shut out by a guesser"
        assert client.get("/api/settings").status_code == 401, "no key is no guess"
        now = 6.0
        assert asked("second-key-of-two") == 200
        assert [asked("guess") for _ in range(2)] == [401, 429]


def test_a_rate_is_kept_per_key_and_says_when_to_come_again():
    with client_of(FakeSlot(), api_keys=KEYS, requests_per_minute=6, request_burst=2) as client:
        first, second = ({"x-api-key": key.get_secret_value()} for key in KEYS)
        assert [client.post("/generate", json=ASK, headers=first).status_code for _ in range(3)] == [200, 200, 429]
        refused = client.post("/v1/chat/completions", json={}, headers=first)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert client.post("/generate", json=ASK, headers=second).status_code == 200
        assert all(client.get("/healthz").status_code == 200 for _ in range(20))


def test_buckets_fill_with_time_and_idle_callers_are_forgotten():
    now = 0.0
    buckets, rate = TokenBuckets(lambda: now), Rate(0.5, 2)
    assert [buckets.take("a", rate) for _ in range(3)] == [0, 0, 2]
    assert buckets.room("a", rate) == Room(requests=0, wait_seconds=2, full_seconds=4.0)
    now = 2.0
    assert [buckets.take("a", rate) for _ in range(2)] == [0, 2]
    now = 1000.0
    assert [buckets.take("a", rate) for _ in range(3)] == [0, 0, 2]
    for number in range(20_000):
        buckets.take(str(number), rate)
    assert len(buckets._buckets) == 10_000


def test_an_address_open_to_others_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="NIGHTSCHOOL_API_KEY"):
            ServerSettings(host=host).check()
        ServerSettings(host=host, api_keys=KEYS).check()
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        ServerSettings(host=host).check()


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the night shift\nthird-key-abc\n\n")
    keys = read_api_keys({"NIGHTSCHOOL_API_KEY": "first-key-abc, second-key-abc,"}, file)
    assert [key.key.get_secret_value() for key in keys] == ["first-key-abc", "second-key-abc", "third-key-abc"]
    assert "first-key-abc" not in repr(ServerSettings(api_keys=keys))
    assert read_api_keys({}) == ()
    for bad in ("short", "has a space in it", "schlüssel-schlüssel"):
        with pytest.raises(UsageError, match="at least 8"):
            read_api_keys({"NIGHTSCHOOL_API_KEY": bad})
    with pytest.raises(NotFound, match="gone"):
        read_api_keys({}, tmp_path / "gone")


def test_a_key_in_a_file_may_have_a_tenant_and_scopes(tmp_path):
    file = tmp_path / "keys"
    file.write_text("plain-key-abc\ntheirs-key-abc tenant=acme\nreader-key-abc tenant=acme  scopes=infer,feedback\n")
    assert [(key.tenant, key.scopes) for key in read_api_keys({}, file)] == [
        ("default", SCOPES),
        ("acme", SCOPES),
        ("acme", frozenset({"infer", "feedback"})),
    ]
    file.write_text("older-key-abc scopes=generate,feedback,manage")
    assert read_api_keys({}, file)[0].scopes == {"infer", "feedback", "admin"}, "as scopes were called before"
    for line, wrong in (
        ("tenat=acme", "is followed by 'tenat'"),
        ("acme", "is followed by 'acme'"),
        ("scopes=generate,fly", "there is no scope fly"),
        ("scopes=", "there is no scope"),
    ):
        file.write_text(f"theirs-key-abc {line}")
        with pytest.raises(UsageError, match=f"begins with 'th' .*{wrong}"):
            read_api_keys({}, file)
    file.write_text("theirs-key-abc tenant=../acme")
    with pytest.raises(NameRefused, match=r"tenant '\.\./acme' is refused"):
        read_api_keys({}, file)


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("infer", "POST", "/generate"),
        ("infer", "POST", "/v1/chat/completions"),
        ("feedback", "POST", "/api/feedback"),
        ("feedback", "DELETE", "/api/conversations/r1"),
        ("admin", "POST", "/api/models/bot/promote"),
        ("admin", "GET", "/refresh_model"),
        ("admin", "GET", "/refresh_model%0A"),
        ("admin", "POST", "/api/something/new"),
    ],
)
def test_a_key_may_do_what_its_scopes_say(scope, method, path):
    keys = [ApiKey(key=SecretStr(f"only-{one}-key"), scopes=frozenset({one})) for one in sorted(SCOPES)]
    with client_of(FakeSlot(), api_keys=keys) as client:
        for one in sorted(SCOPES):
            answer = client.request(method, path, json={}, headers={"x-api-key": f"only-{one}-key"})
            refused = answer.status_code == 403 and "lacks the scope" in answer.text
            assert refused == (one != scope), (one, answer.text)


def test_every_route_that_changes_anything_has_a_rule():
    routes = routes_of(create_app([FakeSlot()], ServerSettings()))
    there = {(method, route.path) for route in routes for method in route.methods}
    changing = {(method, path) for method, path in there if method not in ("GET", "HEAD", "OPTIONS")}
    assert changing - RULES.keys() == set(), "each needs a row in server/middleware/route_rules.py"
    assert RULES.keys() - there == set(), "a row for a route that does not exist"
    assert all(rule_of(*one).scope for one in changing)
    assert rule_of("POST", "/api/something/new").scope == "admin"
