"""`nightschool keys`: who may ask a server."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from nightschool.cli.formatting import moment
from nightschool.cli.output import answer, answer_rows, confirm, who
from nightschool.errors import UsageError
from nightschool.events import now
from nightschool.store.api_keys import ApiKeys, StoredKey
from nightschool.store.home import Home
from nightschool.store.principal import DEFAULT_TENANT, SCOPES, parse_scopes
from nightschool.units import parse_seconds


def create(
    *, tenant: str = DEFAULT_TENANT, scopes: str | None = None, expires: str | None = None, label: str = ""
) -> None:
    """Make an API key and show it, once. Servers of this home take it at once.

    Args:
        tenant: Whose names it may ask for, and whose data it makes; a tenant needs no other preparation.
        scopes: What it may do, with commas: infer (ask models), feedback (rate, correct and delete answers), train
            (start and cancel jobs), memory (read and change memories), admin (promote, roll back, unload). All of them
            without it.
        expires: After how long it opens nothing any more: 12h, 90d. Never without it.
        label: A few words of your own, such as whom it is for.
    """
    try:
        chosen = SCOPES if scopes is None else parse_scopes(scopes.split(","))
        ends = None if expires is None else now() + timedelta(seconds=parse_seconds(expires))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"The key cannot be made: {error}.") from None
    key, text = ApiKeys(Home.find().database).create(
        tenant, scopes=chosen, expires_at=ends, label=label, by=f"cli:{who()}"
    )
    lines = [
        f"{text}",
        "",
        f"This is {key.id}, of the tenant {key.tenant}: {', '.join(sorted(key.scopes))}; it "
        + (f"expires {moment(key.expires_at)} UTC." if key.expires_at else "does not expire."),
        "It is not shown again: only its digest is kept.",
    ]
    answer(_row(key) | {"key": text}, "\n".join(lines), quiet=text)


def ls(*, tenant: str | None = None) -> None:
    """List keys, newest first; never what they are, only what they are called and may do.

    Args:
        tenant: Only keys of this tenant.
    """
    keys = ApiKeys(Home.find().database).ls(tenant)
    answer_rows(
        [_row(key) for key in keys],
        {
            "KEY": "id",
            "TENANT": "tenant",
            "STATE": "state",
            "SCOPES": lambda row: ",".join(row["scopes"]),
            "CREATED": lambda row: moment(row["created_at"]),
            "EXPIRES": lambda row: moment(row["expires_at"]),
            "LAST USED": lambda row: moment(row["last_used_at"]),
            "LABEL": lambda row: row["label"] or None,
        },
        none="No keys yet. Make one with nightschool keys create.",
        quiet="id",
    )


def revoke(key: str, /, *more: str, yes: bool = False) -> None:
    """Let keys open nothing any more; running servers refuse them within two seconds.

    Args:
        key: Its id in keys ls, such as key_0123456789ab.
        more: More keys.
        yes: Do not ask.
    """
    keys = ApiKeys(Home.find().database)
    found = [keys.get(one) for one in (key, *more)]
    confirm(f"Revoke {', '.join(_described(one) for one in found)}?", yes=yes)
    for one in found:
        keys.revoke(one.id, by=f"cli:{who()}")
    names = [one.id for one in found]
    answer({"revoked": names}, f"Revoked {', '.join(names)}.", quiet="\n".join(names))


def _described(key: StoredKey) -> str:
    return f"{key.id} ({key.tenant}{', ' if key.label else ''}{key.label})"


def _row(key: StoredKey) -> dict[str, Any]:
    def written(value: datetime | None) -> str | None:
        return value.isoformat() if value else None

    return {
        "id": key.id,
        "tenant": key.tenant,
        "state": key.state(now()),
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created_at": written(key.created_at),
        "created_by": key.created_by,
        "expires_at": written(key.expires_at),
        "revoked_at": written(key.revoked_at),
        "last_used_at": written(key.last_used_at),
    }
