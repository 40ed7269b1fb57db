"""Tenants as people look at them: what each may use, has used today, and has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nightschool.events import now
from nightschool.store.api_keys import ApiKeys
from nightschool.store.atomic import folder_bytes
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.store.names import home_of, tenants_of
from nightschool.store.principal import DEFAULT_TENANT
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.tenants import Tenants, day_of


def tenant_names(home: Home) -> list[str]:
    """Every tenant that has anything, the default one first."""
    found = Tenants(home.database).known() | set(tenants_of(home))
    return [DEFAULT_TENANT, *sorted(found - {DEFAULT_TENANT})]


def tenant_view(home: Home, tenant: str) -> dict[str, Any]:
    """One tenant. `quota` holds its bounds, None where there is none; `today` what it has used since midnight UTC."""
    tenants, registry, moment = Tenants(home.database), Registry(home), now()
    names = registry.names(tenant)
    folder = home_of(home, tenant).path
    return {
        "tenant": tenant,
        "quota": asdict(tenants.quota(tenant)),
        "today": asdict(tenants.used(tenant, day_of(moment))),
        "active_keys": sum(key.is_active(moment) for key in ApiKeys(home.database).ls(tenant)),
        "names": names,
        "versions": sum(len(registry.versions(name)) for name in names),
        "runs": len(RunStore(home).ls(tenant)),
        "open_jobs": sum(not job.is_final for job in JobQueue(home.database).ls(tenant=tenant)),
        # The default tenant's lies in the home itself, among what is everybody's.
        "size_bytes": folder_bytes(folder) if tenant != DEFAULT_TENANT and folder.is_dir() else None,
    }
