"""`nightschool audit`: who did what, and what the command line adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from nightschool.cli.formatting import moment
from nightschool.cli.output import answer_rows, note, who
from nightschool.errors import NameRefused, NightschoolError, UsageError
from nightschool.events import now
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.names import parse_ref
from nightschool.store.principal import DEFAULT_TENANT
from nightschool.units import parse_seconds


def ls(
    *, tenant: str | None = None, action: str | None = None, since: str | None = None, limit: int | None = 100
) -> None:
    """List what was done to keys, tenants, versions, jobs and data, newest first: when, by whom, to what.

    Args:
        tenant: Only what was done to things of this tenant.
        action: Only this action, such as key.revoke, or all that begin with it: key, tenant, model, job, conversation.
        since: Only the last 90m, 24h, 7d.
        limit: At most so many rows; 0 lists all.
    """
    try:
        begin = None if since is None else now() - timedelta(seconds=parse_seconds(since))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--since: {error}.") from None
    rows = AuditLog(Home.find().database).ls(tenant=tenant, action=action, since=begin, limit=limit or None)
    answer_rows(
        [row.to_json() for row in rows],
        {
            "WHEN": lambda row: moment(row["at"]),
            "TENANT": "tenant",
            "BY": lambda row: row["key_id"] or row["by"],
            "ACTION": "action",
            "TARGET": lambda row: row["target"] or None,
        },
        none="Nothing is in the audit log yet: no key was made, and nothing promoted, submitted or deleted.",
        quiet=lambda row: f"{row['at']} {row['action']} {row['target']}",
    )


def note_verb(action: str, arguments: Sequence[str]) -> None:
    """Note what a verb has done: its target are its arguments without options.

    A log that cannot be written is said, and changes nothing: what was done is done.
    """
    targets = [word for word in arguments if not word.startswith("-")]
    try:
        tenant = parse_ref(targets[0]).tenant if targets else DEFAULT_TENANT
    except NameRefused:
        tenant = DEFAULT_TENANT
    try:
        AuditLog(Home.find().database).record(action, " ".join(targets), tenant=tenant, by=f"cli:{who()}")
    except NightschoolError as error:
        note(f"It is not in the audit log: {error}")
