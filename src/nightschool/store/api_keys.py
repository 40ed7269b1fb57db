"""API keys in the state database: made here, shown once, kept as their SHA-256 alone.

A key is 256 random bits, so that its digest needs no salt and cannot be searched. Rows are never deleted: once there
was a key, a server asks for one, also after the last was revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa

from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.events import now
from nightschool.store import audit
from nightschool.store.database import Database
from nightschool.store.names import check_name
from nightschool.store.principal import SCOPES, Scope, parse_scopes
from nightschool.store.tables import api_keys

KEY_PREFIX = "ns-"
KEY_ID_PREFIX = "key_"
_MOST_LABEL = 200


@dataclass(frozen=True)
class StoredKey:
    """What is known of a key. `id` names it for people and opens nothing; `created_by` is who made it."""

    id: str
    tenant: str
    label: str
    scopes: frozenset[Scope]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_active(self, moment: datetime) -> bool:
        """Whether it opens anything at that moment."""
        return self.revoked_at is None and (self.expires_at is None or moment < self.expires_at)

    def state(self, moment: datetime) -> Literal["active", "expired", "revoked"]:
        """In one word."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.is_active(moment) else "expired"


def digest_of(key: str) -> str:
    """What is kept of a key: its SHA-256 in hex digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class ApiKeys:
    """The keys of a home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant: str,
        *,
        by: str,
        scopes: Collection[Scope] = SCOPES,
        expires_at: datetime | None = None,
        label: str = "",
    ) -> tuple[StoredKey, str]:
        """Make a key. Returns it with its text, which cannot be read again.

        Raises:
            NameRefused: If the tenant is no name.
            UsageError: If there is no scope, the label is too long, or it would have expired already.
        """
        check_name(tenant, what="tenant")
        moment = now()
        if not scopes:
            raise UsageError(f"A key without scopes opens nothing. Give some of {', '.join(sorted(SCOPES))}.")
        if len(label) > _MOST_LABEL:
            raise UsageError(f"The label has {len(label)} characters; write at most {_MOST_LABEL}.")
        if expires_at is not None and expires_at <= moment:
            raise UsageError(f"The key would have expired at {expires_at.isoformat()} already. Choose a later moment.")
        text = KEY_PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": KEY_ID_PREFIX + secrets.token_hex(6),
            "digest": digest_of(text),
            "tenant": tenant,
            "label": label,
            "scopes": sorted(scopes),
            "created_at": moment,
            "created_by": by,
            "expires_at": expires_at,
        }
        with self._database.write() as connection:
            connection.execute(api_keys.insert().values(row))
            audit.note(connection, "key.create", str(row["id"]), tenant=tenant, by=by)
        return self.get(str(row["id"])), text

    def find(self, digest: str) -> StoredKey | None:
        """The key with this digest, whatever its state; None if there is none."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.digest == digest)).first()
        if row is None or not hmac.compare_digest(row.digest, digest):
            return None
        return _key(row)

    def any(self) -> bool:
        """Whether a key was ever made."""
        with self._database.read() as connection:
            return connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None

    def get(self, key_id: str) -> StoredKey:
        """The key with this id. Raises NotFound if there is none."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).first()
        if row is None:
            raise NotFound(f"There is no API key {key_id!r}. List keys with nightschool keys ls.")
        return _key(row)

    def ls(self, tenant: str | None = None) -> list[StoredKey]:
        """All keys, or those of a tenant, newest first."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._database.read() as connection:
            return [_key(row) for row in connection.execute(query)]

    def revoke(self, key_id: str, *, by: str) -> StoredKey:
        """Let a key open nothing any more; servers know it within two seconds.

        Raises:
            NotFound: If there is no such key.
            Conflict: If it was revoked before.
        """
        before = self.get(key_id)
        with self._database.write() as connection:
            changed = connection.execute(
                api_keys.update()
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=now())
            )
            if not changed.rowcount:
                raise Conflict(f"The API key {key_id} was revoked before and opens nothing. There is nothing to do.")
            audit.note(connection, "key.revoke", key_id, tenant=before.tenant, by=by)
        return self.get(key_id)

    def note_use(self, moments: Mapping[str, datetime]) -> None:
        """Write when keys, by their ids, were used last."""
        with self._database.write() as connection:
            for key_id, moment in moments.items():
                connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=moment))


def _key(row: sa.Row[Any]) -> StoredKey:
    return StoredKey(
        id=row.id,
        tenant=row.tenant,
        label=row.label,
        scopes=parse_scopes(row.scopes),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
