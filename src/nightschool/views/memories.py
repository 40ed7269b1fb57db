"""Explicit memories as people look at them: which there are, and what each holds."""

from __future__ import annotations

from typing import Any

from nightschool.errors import NightschoolError
from nightschool.memory.store import MemoryStore
from nightschool.store.atomic import folder_bytes
from nightschool.store.home import Home
from nightschool.store.names import full_name, home_of, is_name, memory_path, tenants_of


def memory_names(home: Home, tenant: str | None = None) -> list[str]:
    """The memories of a tenant, or of all of them, by their full names."""
    found = []
    for one in tenants_of(home) if tenant is None else [tenant]:
        folder = home_of(home, one).memories
        if folder.is_dir():
            found += [full_name(one, path.name) for path in sorted(folder.iterdir()) if is_name(path.name)]
    return found


def memory_rows(home: Home, tenant: str | None = None) -> list[dict[str, Any]]:
    """Each memory with its size, its newest revision and when that was written; one that cannot be read says why."""
    return [describe_memory(home, name) for name in memory_names(home, tenant)]


def describe_memory(home: Home, name: str) -> dict[str, Any]:
    """One memory; `problem` says why it cannot be read, if so."""
    folder = memory_path(home, name)
    facts: dict[str, Any] = {"name": name, "entries": None, "revision": None, "changed_at": None, "versions": []}
    try:
        with MemoryStore.open(folder) as store:
            newest = store.revisions(after=store.revision - 1)[-1]
            facts |= {
                "entries": store.count(at=newest.revision),
                "revision": newest.revision,
                "changed_at": newest.at.isoformat(),
                "versions": [version.name for version in store.versions()],
            }
    except NightschoolError as error:
        facts["problem"] = str(error)
    return facts | {"size_bytes": folder_bytes(folder) if folder.is_dir() else 0}
