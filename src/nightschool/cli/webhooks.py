"""`nightschool webhooks`: who is told of events, and what is on its way. Endpoints are made over HTTP, by their tenants."""

from __future__ import annotations

from dataclasses import asdict

from nightschool.cli.output import Row, answer, answer_rows
from nightschool.store.home import Home
from nightschool.webhooks.deliveries import Deliveries
from nightschool.webhooks.endpoints import Endpoints


def ls() -> None:
    """List the webhook endpoints of all tenants, newest first; their secrets are not shown."""
    rows: list[Row] = [
        {
            "id": one.id,
            "tenant": one.tenant,
            "name": one.name,
            "url": one.url,
            "event_types": one.event_types,
            "state": "disabled" if one.disabled_at else "enabled",
        }
        for one in Endpoints(Home.find().database).ls()
    ]
    answer_rows(
        rows,
        {
            "ENDPOINT": "id",
            "TENANT": "tenant",
            "STATE": "state",
            "URL": "url",
            "EVENTS": lambda row: ",".join(row["event_types"]),
        },
        none="There are no webhook endpoints. A tenant makes one with POST /v1/webhook_endpoints.",
        quiet="id",
    )


def deliveries(*, failed: bool = False, limit: int = 100) -> None:
    """List what was sent to webhook endpoints, what waits for its next attempt, and what was given up; newest first.

    Args:
        failed: Only what was given up.
        limit: How many.
    """
    found = Deliveries(Home.find().database).ls(states=["failed"] if failed else None, limit=limit)
    rows = [asdict(one) for one in found]
    answer_rows(
        rows,
        {
            "EVENT": "event_id",
            "TYPE": "event_type",
            "ENDPOINT": "endpoint_id",
            "STATE": "state",
            "ATTEMPTS": "attempts",
            "LAST": lambda row: row["error"] or row["status_code"],
        },
        none="Nothing was given up." if failed else "Nothing was to be sent yet.",
        quiet="event_id",
    )


def retry(event: str, /) -> None:
    """Send an event once more to the endpoints that did not take it.

    Args:
        event: Its id in `webhooks deliveries`.
    """
    count = Deliveries(Home.find().database).retry(event)
    answer(
        {"event": event, "endpoints": count},
        f"{event} is sent again to {count} endpoints by the next server or worker.",
        quiet=event,
    )
