"""The audit log: who did what to which thing, when. The database lets nobody change or delete a row.

It holds names and ids, never what people asked, what models said, or a key.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.tables import audit_log

_MOST_TARGET = 400


@dataclass(frozen=True)
class AuditEntry:
    """One row. `tenant` is whose thing `target` is; `by` is `cli:USER` or `http`, with the key's id if there was one."""

    at: datetime
    tenant: str
    key_id: str | None
    by: str
    action: str
    target: str
    request_id: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"at": self.at.isoformat()}


def note(
    connection: Connection,
    action: str,
    target: str,
    *,
    tenant: str,
    by: str,
    key_id: str | None = None,
    request_id: str | None = None,
) -> None:
    """Add a row within a transaction: it is kept if, and only if, what it tells of is."""
    row = {
        "at": now(),
        "tenant": tenant,
        "key_id": key_id,
        "by": by,
        "action": action,
        "target": target[:_MOST_TARGET],
        "request_id": request_id,
    }
    connection.execute(audit_log.insert().values(row))


class AuditLog:
    """The rows of a home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, action: str, target: str, *, tenant: str, by: str, **more: str | None) -> None:
        """Add a row of what was done elsewhere; `more` as for `note`."""
        with self._database.write() as connection:
            note(connection, action, target, tenant=tenant, by=by, **more)

    def ls(
        self,
        *,
        tenant: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        limit: int | None = None,
    ) -> list[AuditEntry]:
        """The rows, newest first: of one tenant, of one action or of all that begin with it and a dot, since a moment."""
        query = sa.select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(audit_log.c.tenant == tenant)
        if action is not None:
            query = query.where(
                sa.or_(audit_log.c.action == action, audit_log.c.action.startswith(f"{action}.", autoescape=True))
            )
        if since is not None:
            query = query.where(audit_log.c.at >= since)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            AuditEntry(row.at, row.tenant, row.key_id, row.by, row.action, row.target, row.request_id) for row in rows
        ]
