"""Removing a tenant: what it has on the disk and in the database, but not what the audit log says of it."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from nightschool.errors import Conflict, Damaged, NotFound
from nightschool.events import now
from nightschool.store import audit
from nightschool.store.atomic import folder_bytes, remove_folder
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.store.names import check_name, home_of, tenants_of
from nightschool.store.principal import DEFAULT_TENANT
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.tables import api_keys, checkpoint_permissions, tenants, uploads
from nightschool.store.tenants import Tenants, tables_of_tenants


@dataclass(frozen=True)
class Belongings:
    """What a tenant has: rows by table, keys that still open something, bytes in its folder."""

    tenant: str
    rows: dict[str, int]
    active_keys: int
    size_bytes: int


def belongings(home: Home, tenant: str) -> Belongings:
    """What would be removed.

    Raises:
        NameRefused: If it is no name.
        Conflict: If it is the default tenant.
        NotFound: If there is nothing of it.
    """
    check_name(tenant, what="tenant")
    if tenant == DEFAULT_TENANT:
        raise Conflict("The default tenant cannot be removed: it is the home. Remove its models and runs one by one.")
    with home.database.read() as connection:
        rows = {name: _count(connection, table, where) for name, table, where in _rows(tenant)}
        active = (api_keys.c.tenant == tenant) & api_keys.c.revoked_at.is_(None)
        keys = _count(connection, api_keys, active)
    folder = home_of(home, tenant).path
    if not (any(rows.values()) or keys or folder.is_dir()):
        known = sorted(Tenants(home.database).known() | set(tenants_of(home)))
        raise NotFound(f"There is no tenant {tenant!r}. There are {', '.join(known)}.")
    size = folder_bytes(folder) if folder.is_dir() else 0
    return Belongings(tenant, {name: count for name, count in rows.items() if count}, keys, size)


def remove_tenant(home: Home, tenant: str, *, by: str) -> Belongings:
    """Remove all of a tenant, its keys first; where that is cut off, it goes on when it is called again.

    Revoked keys stay as such, so that they are known to open nothing.

    Raises:
        NameRefused, NotFound: As `belongings`.
        Conflict: Likewise, or if something of it runs, or another tenant's adapter stands on a version of it.
    """
    found = belongings(home, tenant)
    _refuse_used(home, tenant)
    with home.database.write() as connection:
        mine = (api_keys.c.tenant == tenant) & api_keys.c.revoked_at.is_(None)
        connection.execute(api_keys.update().where(mine).values(revoked_at=now()))
        for _, table, where in _rows(tenant):
            connection.execute(table.delete().where(where))
        audit.note(connection, "tenant.delete", tenant, tenant=tenant, by=by)
    home.database.clear_log()
    folder = home_of(home, tenant).path
    if folder.is_dir():
        remove_folder(folder)
    return found


def _refuse_used(home: Home, tenant: str) -> None:
    moment = now()
    for job in JobQueue(home.database).ls(tenant=tenant, states=["running"]):
        if job.lease.is_held_by_another(moment):
            raise Conflict(
                f"The job {job.id} is running. End it with nightschool jobs cancel {job.id}, and wait until it has ended."
            )
    living = [run.id for run in RunStore(home).ls(tenant) if run.status.process_lives]
    if living:
        raise Conflict(f"{living[0]} is running. Stop it with nightschool runs stop {living[0]}, and wait for its end.")
    registry = Registry(home)
    own = set(registry.names(tenant))
    for other in (one for one in tenants_of(home) if one != tenant):
        for version in (version for name in registry.names(other) for version in registry.versions(name)):
            try:
                base = version.facts.base
            except Damaged:
                continue
            if base.partition("@")[0] in own:
                raise Conflict(f"{base} is the base of {version.ref}, which another tenant has. Remove that first.")


def _rows(tenant: str) -> list[tuple[str, sa.Table, sa.ColumnElement[bool]]]:
    """Where rows of a tenant are, those first that name others."""
    found = [(table.name, table, table.c.tenant == tenant) for table in reversed(tables_of_tenants())]
    # What others let it do goes, too: who takes the name later on is somebody else.
    granted = checkpoint_permissions.c.project == tenant
    found.append((f"{checkpoint_permissions.name} from others", checkpoint_permissions, granted))
    found.append((uploads.name, uploads, uploads.c.run_id.startswith(f"{tenant}/", autoescape=True)))
    return [*found, (tenants.name, tenants, tenants.c.name == tenant)]


def _count(connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool]) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one()
