"""What is to be sent to webhook endpoints: claimed with a lease, tried again for a day and a half, then given up."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from nightschool.errors import NotFound
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.tables import webhook_deliveries, webhook_endpoints
from nightschool.webhooks.endpoints import Endpoint
from nightschool.webhooks.sender import TIMEOUT_SECONDS
from nightschool.work.lease import Lease, Leased

DeliveryState = Literal["pending", "delivered", "failed"]

# Seconds before each further attempt, as Standard Webhooks advises.
PAUSES_SECONDS = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000)
_LEASE_SECONDS = 4 * TIMEOUT_SECONDS
_MOST_AT_ONCE = 8
_GONE = 410
KEPT = timedelta(days=30)
"""How long a finished delivery can be looked up."""


@dataclass(frozen=True)
class Delivery(Leased):
    """One event on its way to one endpoint. `status_code` and `error` are of the last attempt."""

    event_id: str
    endpoint_id: str
    event_type: str
    body: str
    state: DeliveryState
    attempts: int
    next_try_at: datetime
    created_at: datetime
    owner: str | None = None
    lease_until: datetime | None = None
    status_code: int | None = None
    error: str | None = None
    finished_at: datetime | None = None


class Deliveries:
    """The deliveries of all tenants of a home."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def claim(self) -> list[tuple[Delivery, Endpoint]]:
        """Take what is due for this process: a few at a time, one for each endpoint, so that a slow one holds up no other."""
        moment = now()
        lease = Lease.begin(moment, _LEASE_SECONDS)
        claimed: dict[str, Delivery] = {}
        due = sa.select(webhook_deliveries).where(
            webhook_deliveries.c.state == "pending", webhook_deliveries.c.next_try_at <= moment
        )
        if not self._has_any(due):
            return []
        with self._db.write(alone_in=webhook_deliveries) as connection:
            for row in connection.execute(due.order_by(webhook_deliveries.c.next_try_at)):
                delivery = Delivery(**row._mapping)
                if delivery.endpoint_id not in claimed and not delivery.lease.is_held_by_another(moment):
                    claimed[delivery.endpoint_id] = delivery
                if len(claimed) == _MOST_AT_ONCE:
                    break
            for delivery in claimed.values():
                connection.execute(_row(delivery).values(lease.columns))
            of_them = sa.select(webhook_endpoints).where(webhook_endpoints.c.id.in_(list(claimed)))
            endpoints = {row.id: Endpoint(**row._mapping) for row in connection.execute(of_them)}
        return [(delivery, endpoints[name]) for name, delivery in claimed.items()]

    def note(
        self, delivery: Delivery, *, status: int | None, error: str | None = None, wait_seconds: float = 0
    ) -> None:
        """Note how an attempt ended: delivered, to be tried again, or given up for good.

        An endpoint that answers 410 wants nothing any more, so nothing further is entered for it.
        """
        moment = now()
        values: dict[str, Any] = {"attempts": delivery.attempts + 1, "status_code": status, "error": error}
        values |= {"owner": None, "lease_until": None}
        if status is not None and 200 <= status < 300:
            values |= {"state": "delivered", "finished_at": moment}
        elif status == _GONE or delivery.attempts >= len(PAUSES_SECONDS):
            values |= {"state": "failed", "finished_at": moment}
        else:
            pause = max(wait_seconds, PAUSES_SECONDS[delivery.attempts] * random.uniform(1, 1.2))
            values["next_try_at"] = moment + timedelta(seconds=pause)
        with self._db.write() as connection:
            connection.execute(_row(delivery).values(values))
            if status == _GONE:
                gone = webhook_endpoints.update().where(webhook_endpoints.c.id == delivery.endpoint_id)
                connection.execute(gone.values(disabled_at=moment))

    def ls(self, *, states: list[DeliveryState] | None = None, limit: int = 100) -> list[Delivery]:
        """The newest deliveries, of some states or of all."""
        query = sa.select(webhook_deliveries).order_by(webhook_deliveries.c.created_at.desc()).limit(limit)
        if states:
            query = query.where(webhook_deliveries.c.state.in_(states))
        with self._db.read() as connection:
            return [Delivery(**row._mapping) for row in connection.execute(query)]

    def retry(self, event_id: str) -> int:
        """Send an event once more to whoever did not take it, from the beginning of the pauses. Returns to how many.

        Raises:
            NotFound: If there is no such event, or everybody took it.
        """
        open_ones = (webhook_deliveries.c.event_id == event_id) & (webhook_deliveries.c.state != "delivered")
        anew = {"state": "pending", "attempts": 0, "next_try_at": now(), "finished_at": None}
        with self._db.write() as connection:
            count = connection.execute(webhook_deliveries.update().where(open_ones).values(anew)).rowcount
        if not count:
            raise NotFound(
                f"There is no event {event_id} that somebody did not take. See nightschool webhooks deliveries."
            )
        return int(count)

    def sweep(self) -> None:
        """Forget what was finished long ago."""
        old = webhook_deliveries.c.finished_at < now() - KEPT
        if self._has_any(sa.select(webhook_deliveries).where(old)):
            with self._db.write() as connection:
                connection.execute(webhook_deliveries.delete().where(old))

    def _has_any(self, query: sa.Select[Any]) -> bool:
        """Looking takes no lock, and makes no database where there is none."""
        with self._db.read() as connection:
            return connection.execute(query.limit(1)).first() is not None


def _row(delivery: Delivery) -> sa.Update:
    return webhook_deliveries.update().where(
        webhook_deliveries.c.event_id == delivery.event_id, webhook_deliveries.c.endpoint_id == delivery.endpoint_id
    )
