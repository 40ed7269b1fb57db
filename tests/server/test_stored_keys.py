"""Keys of the database on a server that runs: they count at once, end at once, and a failing database opens nothing."""

import time
from datetime import timedelta

import pytest
from sqlalchemy.exc import OperationalError

from nightschool.errors import Damaged, UsageError
from nightschool.events import now
from nightschool.server import run
from nightschool.server.middleware.lookups import FRESH_SECONDS
from nightschool.server.settings import ServerSettings
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually, server_log

ASK = {"query": "a"}


@pytest.fixture
def home(tmp_path):
    with Database(Home(tmp_path / "home")).connect() as database:
        home = Home(tmp_path / "home")
        home.__dict__["database"] = database
        yield home


@pytest.fixture
def keys(home):
    return ApiKeys(home.database)


@pytest.fixture
def a_key(keys):
    """One that was there before the server was."""
    return keys.create("default", by="test")[1]


@pytest.fixture
def client(home):
    slots = [FakeSlot(), FakeSlot("acme/bot")]
    with client_of(slots, registry=Registry(home)) as client:
        yield client


def asked(client, key=None, **more):
    headers = {"x-api-key": key} if key else {}
    return client.post("/generate", json=ASK | more, headers=headers)


def test_a_key_made_while_the_server_runs_counts_at_once_and_then_nobody_asks_without(client, keys):
    assert asked(client).status_code == 200
    assert asked(client, "sk-what-clients-send-when-they-must-send-something").status_code == 200
    _, text = keys.create("acme", by="test")
    first = asked(client, text)
    assert (first.status_code, first.headers["x-model-version"]) == (200, "acme/bot@20251202_115436")
    eventually(lambda: asked(client).status_code == 401)
    assert asked(client, "sk-other").status_code == 401
    assert client.get("/healthz").status_code == 200


def test_a_revoked_key_ends_within_two_seconds_and_the_door_stays_shut(client, keys):
    made, text = keys.create("default", by="test")
    assert asked(client, text).status_code == 200
    keys.revoke(made.id, by="test")
    began = time.monotonic()
    eventually(lambda: asked(client, text).status_code == 401)
    assert FRESH_SECONDS <= 1.0, "or the two seconds are no more true"
    assert time.monotonic() - began < 60
    assert asked(client, text).json()["detail"].startswith("The API key is not known, or was revoked, or has expired.")
    assert asked(client).status_code == 401


def test_an_expired_key_is_refused_however_lately_it_was_looked_up(client, keys, monkeypatch):
    _, text = keys.create("default", by="test", expires_at=now() + timedelta(hours=1))
    assert asked(client, text).status_code == 200
    later = now() + timedelta(hours=2)
    monkeypatch.setattr("nightschool.server.middleware.keyring.now", lambda: later)
    assert asked(client, text).status_code == 401


def test_a_key_may_do_what_its_scopes_say(client, keys):
    _, text = keys.create("default", by="test", scopes={"infer"})
    assert asked(client, text).status_code == 200
    refused = client.post("/refresh_model", headers={"x-api-key": text})
    assert refused.status_code == 403
    assert "'admin'" in refused.json()["detail"]


@pytest.mark.parametrize(
    "text", ["ns-", "ns-" + "A" * 43, "ns-" + "x" * 100_000, "ns-\x7f", "ns-' OR 1=1 --", b"ns-\xff\xfe"]
)
def test_a_key_that_nobody_made_opens_nothing(a_key, client, text):
    refused = client.post("/generate", json=ASK, headers={"x-api-key": text})
    assert refused.status_code == 401
    assert refused.json()["detail"].startswith("The API key is not known")


def test_a_database_that_fails_opens_nothing(home, keys):
    _, text = keys.create("default", by="test")
    settings = {"api_keys": ["a-key-of-the-settings"], "registry": Registry(home)}
    with client_of(FakeSlot(), **settings) as client, server_log() as log:
        assert asked(client, text).status_code == 200

        def fail(*_):
            raise OperationalError("SELECT", {}, Exception("gone"))

        home.database._engine_to_read = fail
        eventually(lambda: asked(client, text).status_code == 503)
        refused = asked(client, text)
        assert refused.headers["retry-after"] == "2"
        assert "gone" not in refused.text
        assert asked(client, "ns-guess").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert any(row["message"] == "a look-up in the database failed" for row in log.rows)
        del home.database._engine_to_read
        assert asked(client, text).status_code == 200, "it came back, and so does who may ask"


def test_a_server_without_keys_whose_database_fails_answers_nobody(home):
    """Somebody may have made a key meanwhile."""
    with client_of(FakeSlot(), registry=Registry(home)) as client:
        assert asked(client).status_code == 200

        def fail(*_):
            raise Damaged("the file is gone")

        home.database._engine_to_read = fail
        eventually(lambda: asked(client).status_code == 503)
        assert client.get("/healthz").status_code == 200


def test_keys_of_the_settings_and_of_the_database_open_one_server(home, keys):
    _, text = keys.create("acme", by="test")
    with client_of(
        [FakeSlot(), FakeSlot("acme/bot")], api_keys=["a-key-of-the-settings"], registry=Registry(home)
    ) as client:
        assert asked(client, "a-key-of-the-settings").headers["x-model-version"].startswith("bot@")
        assert asked(client, text).headers["x-model-version"].startswith("acme/bot@")


def test_wrong_keys_are_no_load_for_the_database(a_key, client, monkeypatch):
    looks = []
    find = ApiKeys.find
    monkeypatch.setattr(ApiKeys, "find", lambda self, digest: looks.append(digest) or find(self, digest))
    statuses = [asked(client, f"ns-guess-{number}").status_code for number in range(30)]
    assert 429 in statuses
    assert len(looks) <= 11, "after ten wrong ones an address is not listened to"


def test_where_others_can_ask_a_key_of_the_database_is_enough(home, keys, monkeypatch):
    settings = ServerSettings(host="0.0.0.0", port=0)
    with pytest.raises(UsageError, match="nightschool keys create"):
        run.serve(home, ["bot"], settings)
    keys.create("default", by="test")
    started = []
    monkeypatch.setattr(run, "run_app", lambda *_: started.append(True))
    monkeypatch.setattr(run, "configure_logs", lambda _: None)
    run.serve(home, ["bot"], settings)
    assert started


def test_a_home_whose_database_cannot_be_read_is_not_served(home):
    home.database.close()
    home.state_db.write_bytes(b"no database" * 1000)
    with pytest.raises(Damaged):
        run.serve(Home(home.path), ["bot"], ServerSettings(port=0))


def test_when_a_key_was_used_is_written(client, keys):
    made, text = keys.create("default", by="test")
    assert asked(client, text).status_code == 200
    used = eventually(lambda: keys.get(made.id).last_used_at)
    assert used >= made.created_at


def test_what_was_done_over_http_is_in_the_audit_log_before_the_answer(client, keys, home):
    made, text = keys.create("default", by="test")
    headers = {"x-api-key": text}
    done = client.post("/refresh_model", headers=headers)
    assert done.status_code == 200
    [row] = AuditLog(home.database).ls(action="model")
    assert (row.tenant, row.key_id, row.by, row.action) == ("default", made.id, "http", "model.refresh")
    assert row.request_id == done.headers["x-request-id"]
    assert (
        client.post("/api/models/bot/promote", json={"version": "20251202_115436"}, headers=headers).status_code == 404
    )
    assert asked(client, text).status_code == 200
    assert len(AuditLog(home.database).ls(action="model")) == 1, "what was refused was not done; asking is no act"
    assert text not in repr(AuditLog(home.database).ls())


def test_an_audit_log_that_cannot_be_written_is_told_in_the_log(client, home, monkeypatch):
    def fail(*_, **__):
        raise Damaged("no room")

    monkeypatch.setattr(AuditLog, "record", fail)
    with server_log() as log:
        assert client.post("/refresh_model").status_code == 200
    [row] = [row for row in log.rows if row["message"] == "the audit log could not be written"]
    assert row["action"] == "model.refresh"
