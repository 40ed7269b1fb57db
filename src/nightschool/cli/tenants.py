"""`nightschool tenants`: who shares a home, and how much each may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cyclopts import Parameter

from nightschool.cli.formatting import figure
from nightschool.cli.output import answer, answer_rows, confirm, who
from nightschool.errors import NotFound, UsageError
from nightschool.store.home import Home
from nightschool.store.names import check_name
from nightschool.store.tenant_removal import Belongings, belongings, remove_tenant
from nightschool.store.tenants import UNBOUNDED, Quota, Tenants
from nightschool.units import format_bytes
from nightschool.views.tenants import tenant_names, tenant_view


def ls() -> None:
    """List every tenant that has anything: keys, models, runs, jobs, conversations, or bounds of its own."""
    home = Home.find()
    answer_rows(
        [tenant_view(home, tenant) for tenant in tenant_names(home)],
        {
            "TENANT": "tenant",
            "KEYS": "active_keys",
            "NAMES": lambda row: len(row["names"]),
            "VERSIONS": "versions",
            "OPEN JOBS": "open_jobs",
            "REQUESTS TODAY": lambda row: row["today"]["requests"],
            "TOKENS TODAY": lambda row: row["today"]["generated_tokens"],
            "BOUNDS": lambda row: _bounds(row["quota"]) or None,
        },
        none="",
        quiet="tenant",
    )


def show(tenant: str, /) -> None:
    """Show one tenant: what it may use, what it used today, what it has.

    Args:
        tenant: Its name.
    """
    home = Home.find()
    check_name(tenant, what="tenant")
    if tenant not in tenant_names(home):
        raise NotFound(f"There is no tenant {tenant!r}. There are {', '.join(tenant_names(home))}.")
    data = tenant_view(home, tenant)

    def text() -> str:
        quota, today = data["quota"], data["today"]
        rows = {_worded(name): "no bound" if value is None else figure(value) for name, value in quota.items()}
        rows |= {f"{_worded(name)} today": str(value) for name, value in today.items()}
        rows |= {"names": ", ".join(data["names"]) or "-"}
        rows |= {_worded(name): str(data[name]) for name in ("active_keys", "versions", "runs", "open_jobs")}
        if data["size_bytes"] is not None:
            rows["on disk"] = format_bytes(data["size_bytes"])
        return "\n".join([f"{'tenant':<24} {tenant}", *(f"{name:<24} {value}" for name, value in rows.items())])

    answer(data, text, quiet=tenant)


@Parameter(name="*")
@dataclass(frozen=True)
class Bounds:
    """What a tenant may use, as options. What is not named is None.

    Attributes:
        requests_per_minute: Requests of all its keys together, or none.
        tokens_per_day: Tokens generated from midnight to midnight in UTC, or none.
        running_trainings: Jobs that may run at once, or none.
        open_trainings: Jobs that may wait, be paused or run, or none.
        stored_versions: Published versions of all its names, or none.
    """

    requests_per_minute: str | None = None
    tokens_per_day: str | None = None
    running_trainings: str | None = None
    open_trainings: str | None = None
    stored_versions: str | None = None

    def given(self) -> dict[str, Any]:
        """Those that were named, as numbers; `none` is no bound.

        Raises:
            UsageError: If one is no number.
        """
        found: dict[str, float | None] = {}
        for name, text in vars(self).items():
            if text is None:
                continue
            kind = float if name == "requests_per_minute" else int
            try:
                found[name] = None if text == "none" else kind(text)
            except ValueError:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is {text!r}. Write a number, or none for no bound.") from None
        return found


_NOT_NAMED = Bounds()


def add(tenant: str, /, *, bounds: Bounds = _NOT_NAMED) -> None:
    """Write down a tenant with its bounds. Without bounds there is no need to: a tenant is there once it has anything.

    Args:
        tenant: A new name.
        bounds: What it may use.
    """
    quota = replace(UNBOUNDED, **bounds.given())
    Tenants(Home.find().database).add(tenant, quota, by=f"cli:{who()}")
    _told(f"Added {tenant}", tenant, quota)


def set_(tenant: str, /, *, bounds: Bounds = _NOT_NAMED) -> None:
    """Change what a tenant may use. Servers follow within two seconds. What is not named stays; none takes a bound away.

    Args:
        tenant: Its name; default means whoever names no tenant.
        bounds: What changes.
    """
    given = bounds.given()
    if not given:
        raise UsageError(
            f"No bound is named. Write for example nightschool tenants set {tenant} --tokens-per-day 100000."
        )
    _told(f"Changed {tenant}", tenant, Tenants(Home.find().database).set(tenant, given, by=f"cli:{who()}"))


def rm(tenant: str, /, *, yes: bool = False) -> None:
    """Remove a tenant: its keys are revoked, its models, runs, jobs and conversations deleted. The audit log keeps its lines.

    Args:
        tenant: Its name.
        yes: Do not ask.
    """
    home = Home.find()
    confirm(f"Delete all of {tenant}: {_listed(belongings(home, tenant))}?", yes=yes)
    removed = remove_tenant(home, tenant, by=f"cli:{who()}")
    answer(asdict(removed), f"Deleted {tenant}: {_listed(removed)}.", quiet=tenant)


def _listed(found: Belongings) -> str:
    parts = [f"{format_bytes(found.size_bytes)} on disk", f"active keys: {found.active_keys}"]
    return ", ".join([*parts, *(f"{_worded(name)}: {count}" for name, count in found.rows.items())])


def _told(done: str, tenant: str, quota: Quota) -> None:
    answer(
        {"tenant": tenant, "quota": asdict(quota)}, f"{done}: {_bounds(asdict(quota)) or 'no bounds'}.", quiet=tenant
    )


def _bounds(quota: Mapping[str, float | None]) -> str:
    return ", ".join(f"{value:g} {_worded(name)}" for name, value in quota.items() if value is not None)


def _worded(name: str) -> str:
    return name.replace("_", " ")
