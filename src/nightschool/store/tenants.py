"""What each tenant may use, and what it has used today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime

import sqlalchemy as sa

from nightschool.errors import Conflict, UsageError
from nightschool.events import now
from nightschool.store import audit
from nightschool.store.database import Database
from nightschool.store.names import check_name
from nightschool.store.tables import api_keys, metadata, tenants, usage


@dataclass(frozen=True)
class Quota:
    """What a tenant may use; None is unbounded.

    `tokens_per_day` counts generated tokens from midnight to midnight in UTC. `running_trainings` may run at once,
    and `open_trainings` may wait, be paused or run. `stored_versions` counts the published versions of all its names.
    """

    requests_per_minute: float | None = None
    tokens_per_day: int | None = None
    running_trainings: int | None = None
    open_trainings: int | None = None
    stored_versions: int | None = None


UNBOUNDED = Quota()


@dataclass(frozen=True)
class Usage:
    """What a tenant used on one day, as counted when answers ended."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.requests - other.requests,
            self.prompt_tokens - other.prompt_tokens,
            self.generated_tokens - other.generated_tokens,
        )


class Tenants:
    """The quotas and the use of the tenants of a home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self) -> set[str]:
        """Every tenant of which the database has anything but revoked keys and lines of the audit log."""
        columns = [tenants.c.name, *(table.c.tenant for table in tables_of_tenants())]
        queries = [sa.select(column) for column in columns]
        queries.append(sa.select(api_keys.c.tenant).where(api_keys.c.revoked_at.is_(None)))
        with self._database.read() as connection:
            return set(connection.execute(sa.union(*queries)).scalars())

    def quota(self, tenant: str) -> Quota:
        """What a tenant may use; without a row, all is unbounded."""
        with self._database.read() as connection:
            return quota_of(connection, tenant)

    def add(self, tenant: str, quota: Quota, *, by: str) -> None:
        """Write down a new tenant.

        Raises:
            NameRefused: If it is no name.
            UsageError: If a bound is negative.
            Conflict: If it was added before.
        """
        check_name(tenant, what="tenant")
        _check(quota)
        with self._database.write() as connection:
            if connection.execute(sa.select(tenants.c.name).where(tenants.c.name == tenant)).first() is not None:
                raise Conflict(
                    f"The tenant {tenant!r} was added before. Change what it may use with nightschool tenants set {tenant}."
                )
            connection.execute(tenants.insert().values(name=tenant, created_at=now(), **asdict(quota)))
            audit.note(connection, "tenant.add", tenant, tenant=tenant, by=by)

    def set(self, tenant: str, changes: Mapping[str, float | None], *, by: str) -> Quota:
        """Change some bounds of a tenant, which needs no row before. Returns all of them.

        Raises:
            NameRefused: If it is no name.
            UsageError: If a bound is negative.
        """
        check_name(tenant, what="tenant")
        quota = replace(self.quota(tenant), **changes)  # type: ignore[arg-type]  # by name, as the columns are
        _check(quota)
        with self._database.write() as connection:
            changed = connection.execute(tenants.update().where(tenants.c.name == tenant).values(**asdict(quota)))
            if not changed.rowcount:
                connection.execute(tenants.insert().values(name=tenant, created_at=now(), **asdict(quota)))
            audit.note(connection, "tenant.set", tenant, tenant=tenant, by=by)
        return quota

    def used(self, tenant: str, day: str) -> Usage:
        """What a tenant has used on a day (see `day_of`), as far as servers have written it."""
        query = sa.select(usage).where(usage.c.tenant == tenant, usage.c.day == day)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        return Usage() if row is None else Usage(row.requests, row.prompt_tokens, row.generated_tokens)

    def count(self, used: Mapping[tuple[str, str], Usage]) -> None:
        """Add what was used, by tenant and day."""
        with self._database.write() as connection:
            for (tenant, day), more in used.items():
                columns = asdict(more)
                added = {name: usage.c[name] + value for name, value in columns.items()}
                where = (usage.c.tenant == tenant, usage.c.day == day)
                if not connection.execute(usage.update().where(*where).values(added)).rowcount:
                    connection.execute(usage.insert().values(tenant=tenant, day=day, **columns))


def quota_of(connection: sa.Connection, tenant: str) -> Quota:
    """What a tenant may use, within a transaction; without a row, all is unbounded."""
    row = connection.execute(sa.select(tenants).where(tenants.c.name == tenant)).first()
    return UNBOUNDED if row is None else Quota(**{field.name: getattr(row, field.name) for field in fields(Quota)})


def day_of(moment: datetime) -> str:
    """The day of a moment, `YYYY-MM-DD` in UTC as moments of ours are."""
    return f"{moment:%Y-%m-%d}"


def tables_of_tenants() -> list[sa.Table]:
    """The tables whose rows belong to a tenant and go with it. The audit log stays, and so do revoked keys."""
    stays = ("audit_log", "api_keys")
    return [table for table in metadata.sorted_tables if "tenant" in table.c and table.name not in stays]


def _check(quota: Quota) -> None:
    for name, value in asdict(quota).items():
        least = 1e-3 if name == "requests_per_minute" else 0
        if value is not None and not least <= value < 2**53:
            raise UsageError(f"The bound {name} is {value:g}. Write a positive number, or none for no bound.")
