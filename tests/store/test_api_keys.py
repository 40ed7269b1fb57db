"""API keys and the audit log in the database."""

from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from nightschool.errors import Conflict, NameRefused, NotFound, UsageError
from nightschool.events import now
from nightschool.store.api_keys import ApiKeys, digest_of
from nightschool.store.audit import AuditLog
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.principal import SCOPES
from nightschool.store.tables import api_keys, audit_log
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401


def test_a_key_is_shown_once_and_kept_as_its_digest_alone(db):  # noqa: F811
    keys = ApiKeys(db)
    assert not keys.any()
    made, text = keys.create("acme", by="cli:ada", label='a "label"\x00', scopes={"infer"})
    assert text.startswith("ns-")
    assert len(text) >= 3 + 43, "256 random bits"
    assert keys.find(digest_of(text)) == made == keys.get(made.id)
    assert (made.tenant, made.scopes, made.label, made.created_by) == ("acme", {"infer"}, 'a "label"\x00', "cli:ada")
    assert made.state(now()) == "active"
    with db.read() as connection:
        [row] = connection.execute(sa.select(api_keys))
    assert text not in repr(row)
    assert text[3:] not in repr(row)
    assert keys.any()
    assert keys.find(digest_of(text + "x")) is None
    assert text != keys.create("acme", by="cli:ada")[1]


def test_a_key_ends_when_it_is_revoked_or_expires(db):  # noqa: F811
    keys = ApiKeys(db)
    lasting, _ = keys.create("acme", by="ada")
    brief, _ = keys.create("acme", by="ada", expires_at=now() + timedelta(hours=1))
    assert brief.is_active(now())
    assert not brief.is_active(now() + timedelta(hours=1))
    assert brief.state(now() + timedelta(hours=2)) == "expired"
    revoked = keys.revoke(lasting.id, by="ada")
    assert revoked.state(now()) == "revoked"
    assert keys.any(), "a key that was revoked does not open the door"
    with pytest.raises(Conflict, match="revoked before"):
        keys.revoke(lasting.id, by="ada")
    with pytest.raises(NotFound, match="key_none"):
        keys.revoke("key_none", by="ada")
    assert [key.id for key in keys.ls("acme")] == [brief.id, lasting.id]
    assert keys.ls("other") == []


def test_a_key_that_would_open_nothing_is_not_made(db):  # noqa: F811
    keys = ApiKeys(db)
    for more in ({"scopes": ()}, {"label": "x" * 201}, {"expires_at": now()}):
        with pytest.raises(UsageError):
            keys.create("acme", by="ada", **more)
    with pytest.raises(NameRefused):
        keys.create("../acme", by="ada")
    assert not keys.any()
    assert AuditLog(db).ls() == []


def test_the_audit_log_tells_who_did_what(db):  # noqa: F811
    log, keys = AuditLog(db), ApiKeys(db)
    made, text = keys.create("acme", by="cli:ada")
    keys.revoke(made.id, by="cli:ben")
    log.record("model.promote", "bot@20261121_023000\x00", tenant="default", by="http", key_id="key_1", request_id="r1")
    rows = log.ls()
    assert [(row.tenant, row.by, row.action, row.target) for row in rows] == [
        ("default", "http", "model.promote", "bot@20261121_023000\x00"),
        ("acme", "cli:ben", "key.revoke", made.id),
        ("acme", "cli:ada", "key.create", made.id),
    ]
    assert text not in repr(rows)
    assert (rows[0].key_id, rows[0].request_id) == ("key_1", "r1")
    assert log.ls(tenant="acme", limit=1) == [rows[1]]
    assert log.ls(action="key") == rows[1:]
    assert log.ls(action="key.revoke") == [rows[1]]
    assert log.ls(action="ke") == log.ls(since=now() + timedelta(hours=1)) == []


@pytest.mark.parametrize(
    "change", [audit_log.delete(), audit_log.update().values(by="nobody")], ids=["delete", "update"]
)
def test_the_audit_log_is_only_added_to(db, change):  # noqa: F811
    AuditLog(db).record("model.promote", "bot", tenant="default", by="cli:ada")
    with pytest.raises(DatabaseError, match="only added to"), db.write() as connection:
        connection.execute(change)
    assert [row.by for row in AuditLog(db).ls()] == ["cli:ada"]


def test_a_key_that_is_not_stored_is_not_in_the_log(tmp_path):
    """Both are one transaction."""
    with Database(Home(tmp_path)).connect() as database:
        with database.write() as connection:
            connection.exec_driver_sql(
                "CREATE TRIGGER full BEFORE INSERT ON audit_log BEGIN SELECT RAISE(ABORT, 'x'); END"
            )
        with pytest.raises(DatabaseError):
            ApiKeys(database).create("acme", by="ada", scopes=SCOPES)
        assert not ApiKeys(database).any()
