"""Webhook endpoints: where a tenant wants to be told of which events, and the secrets that sign what is sent there."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from nightschool.errors import Conflict, NotFound
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.outbox import EventType
from nightschool.store.tables import webhook_endpoints
from nightschool.webhooks.address import check_url

MOST_ENDPOINTS = 50
"""Of one tenant."""
_OVERLAP = timedelta(hours=24)


@dataclass(frozen=True)
class Endpoint:
    """One place where a tenant is told of events. `secret` is `whsec_` and the key in base64."""

    id: str
    tenant: str
    name: str
    url: str
    event_types: list[EventType]
    secret: str
    created_at: datetime
    updated_at: datetime
    old_secret: str | None = None
    old_secret_until: datetime | None = None
    disabled_at: datetime | None = None

    @property
    def secret_hint(self) -> str:
        """What may be shown of the secret."""
        return f"whsec_…{self.secret[-4:]}"

    def signing_secrets(self, moment: datetime) -> list[str]:
        """The secrets that sign now: after a change, for a day the old one too."""
        overlaps = self.old_secret_until is not None and self.old_secret_until > moment
        return [self.secret, *([self.old_secret] if overlaps and self.old_secret else [])]


class Endpoints:
    """The endpoints of all tenants of a home. What is another tenant's is as if absent."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, tenant: str, *, name: str, url: str, event_types: Sequence[EventType]) -> Endpoint:
        """Add an endpoint with a new secret.

        Raises:
            UsageError: If nothing may be sent to that address (see `address.check_url`).
            Conflict: If the tenant has as many as it may have.
        """
        check_url(url)
        moment = now()
        endpoint = Endpoint(
            id="wh_" + secrets.token_hex(12),
            tenant=tenant,
            name=name,
            url=url,
            event_types=_without_repeats(event_types),
            secret=_new_secret(),
            created_at=moment,
            updated_at=moment,
        )
        with self._db.write(alone_in=webhook_endpoints) as connection:
            own = sa.select(sa.func.count()).where(webhook_endpoints.c.tenant == tenant)
            if connection.execute(own).scalar_one() >= MOST_ENDPOINTS:
                raise Conflict(f"There are {MOST_ENDPOINTS} webhook endpoints, which is the most. Delete one first.")
            connection.execute(webhook_endpoints.insert().values(asdict(endpoint)))
        return endpoint

    def get(self, tenant: str, endpoint_id: str) -> Endpoint:
        """One endpoint. Raises NotFound if the tenant has none of this id."""
        with self._db.read() as connection:
            return _get(connection, tenant, endpoint_id)

    def ls(self, tenant: str | None = None) -> list[Endpoint]:
        """The endpoints of one tenant, or of all, newest first."""
        query = sa.select(webhook_endpoints).order_by(
            webhook_endpoints.c.created_at.desc(), webhook_endpoints.c.id.desc()
        )
        if tenant is not None:
            query = query.where(webhook_endpoints.c.tenant == tenant)
        with self._db.read() as connection:
            return [Endpoint(**row._mapping) for row in connection.execute(query)]

    def update(
        self,
        tenant: str,
        endpoint_id: str,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[EventType] | None = None,
    ) -> Endpoint:
        """Change what is given. One that wanted nothing any more is sent to again.

        Raises:
            NotFound, UsageError: As `get` and `create` do.
        """
        if url is not None:
            check_url(url)
        given = {"name": name, "url": url, "event_types": event_types and _without_repeats(event_types)}
        return self._set(tenant, endpoint_id, {key: value for key, value in given.items() if value is not None})

    def rotate_secret(self, tenant: str, endpoint_id: str, *, keep_old: bool) -> Endpoint:
        """Sign with a new secret from now on; with `keep_old`, for a day with both. Raises NotFound as `get` does."""
        old = self.get(tenant, endpoint_id)
        kept = {"old_secret": old.secret, "old_secret_until": now() + _OVERLAP}
        none = {"old_secret": None, "old_secret_until": None}
        return self._set(tenant, endpoint_id, {"secret": _new_secret()} | (kept if keep_old else none))

    def delete(self, tenant: str, endpoint_id: str) -> None:
        """Remove an endpoint, and what waits to be sent to it. Raises NotFound as `get` does."""
        with self._db.write() as connection:
            _get(connection, tenant, endpoint_id)
            connection.execute(webhook_endpoints.delete().where(webhook_endpoints.c.id == endpoint_id))

    def _set(self, tenant: str, endpoint_id: str, values: dict[str, Any]) -> Endpoint:
        with self._db.write() as connection:
            before = _get(connection, tenant, endpoint_id)
            if any(getattr(before, key) != value for key, value in values.items()):
                values |= {"updated_at": now(), "disabled_at": None}
                changed = webhook_endpoints.update().where(webhook_endpoints.c.id == endpoint_id)
                connection.execute(changed.values(values))
            return _get(connection, tenant, endpoint_id)


def _get(connection: sa.Connection, tenant: str, endpoint_id: str) -> Endpoint:
    own = sa.select(webhook_endpoints).where(
        webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.tenant == tenant
    )
    row = connection.execute(own).one_or_none()
    if row is None:
        raise NotFound(f"There is no webhook endpoint {endpoint_id!r}. GET /v1/webhook_endpoints lists them.")
    return Endpoint(**row._mapping)


def _without_repeats(event_types: Sequence[EventType]) -> list[EventType]:
    return list(dict.fromkeys(event_types))


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
