"""Events that tenants are told of: entered in the transaction of what they tell, sent by `nightschool.webhooks`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import sqlalchemy as sa

from nightschool.events import now
from nightschool.store.tables import webhook_deliveries, webhook_endpoints

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "model.promoted",
    "model.refused",
    "model.rolled_back",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)


def announce(
    connection: sa.Connection, tenant: str, event_type: EventType, data: Mapping[str, Any], *, key: str
) -> None:
    """Enter an event for every endpoint of the tenant that wants it.

    `key` says which event of its type it is: the same one entered twice is sent once.
    """
    moment = now()
    event_id = "evt_" + hashlib.sha256(f"{tenant}\n{event_type}\n{key}".encode()).hexdigest()[:32]
    wanting = sa.select(webhook_endpoints.c.id, webhook_endpoints.c.event_types).where(
        webhook_endpoints.c.tenant == tenant, webhook_endpoints.c.disabled_at.is_(None)
    )
    endpoints = [endpoint for endpoint, wanted in connection.execute(wanting) if event_type in wanted]
    if not endpoints:
        return
    known = sa.select(webhook_deliveries.c.endpoint_id).where(webhook_deliveries.c.event_id == event_id)
    entered = set(connection.execute(known).scalars())
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(moment.timestamp()),
        "type": event_type,
        "data": dict(data),
    }
    rows = [
        {
            "event_id": event_id,
            "endpoint_id": endpoint,
            "event_type": event_type,
            "body": json.dumps(event),
            "state": "pending",
            "attempts": 0,
            "next_try_at": moment,
            "created_at": moment,
        }
        for endpoint in endpoints
        if endpoint not in entered
    ]
    if rows:
        connection.execute(webhook_deliveries.insert(), rows)
