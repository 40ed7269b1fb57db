"""Published versions over HTTP: what there is, promote, roll back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.engine.slot import Slot
from nightschool.errors import NotFound, SwapFailed
from nightschool.feedback import promotion
from nightschool.feedback.erasure import taints_of
from nightschool.memory.staleness import StaleFact, StaleVersions
from nightschool.server.bodies import Body
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.errors import Refusal
from nightschool.server.memories.access import StaleVersionsOf
from nightschool.server.service import PrincipalOf, Service, ServiceOf, published_at, shown_path, timestamp
from nightschool.store.names import PREVIOUS, full_name, parse_ref
from nightschool.store.registry import Registry

router = APIRouter(prefix="/api/models", tags=["Versions"], route_class=BodyRoute)


class StaleEntry(BaseModel):
    """An entry of a memory that a version learned as it said before."""

    memory: str
    id: str


class PublishedVersion(BaseModel):
    """One published version."""

    version: str
    path: str
    created_at: datetime
    tainted: list[str] = Field(
        ..., description="What was deleted and it may know: conversations, and entries of memories, as facts/m12."
    )
    stale: list[StaleEntry] = Field(
        ..., description="What it learned of memories' entries that say something else now."
    )


class NamedModel(BaseModel):
    """A name with its versions, newest first, and its aliases."""

    name: str
    served_version: str | None = Field(..., description="The version that this server answers with, if it serves it.")
    aliases: dict[str, str]
    versions: list[PublishedVersion]


class NamedModels(BaseModel):
    """Every name of the registry."""

    models: list[NamedModel]


class Promote(Body):
    """Which version becomes the champion."""

    version: str = Field(..., min_length=1, max_length=64, description="Such as 20251202_115436.")


class Merge(Body):
    """How adapters of a name are served."""

    merged: bool = Field(..., description="True: in a copy of the base, as large as it. False: apart, beside others.")


class Merged(BaseModel):
    """How they are served now."""

    name: str
    merged: bool
    changed: bool
    served_version: str | None


class Moved(BaseModel):
    """The champion, and what this server answers with."""

    name: str
    champion: str
    served_version: str | None


@router.get("", response_model=NamedModels, responses=problems())
async def every_model(service: ServiceOf, principal: PrincipalOf, stale_versions: StaleVersionsOf) -> Response:
    """Every name with its versions and aliases."""
    registry = _registry(service)

    def look() -> list[dict[str, Any]]:
        stale = _stale_of(stale_versions, principal.tenant)
        return [_described(service, registry, name, stale) for name in registry.names(principal.tenant)]

    return JSONResponse({"models": await anyio.to_thread.run_sync(look)})


@router.get("/{name}", response_model=NamedModel, responses=problems(400, 404))
async def one_model(name: str, service: ServiceOf, principal: PrincipalOf, stale_versions: StaleVersionsOf) -> Response:
    """One name with its versions and aliases."""
    registry = _registry(service)

    def look() -> dict[str, Any]:
        stale = _stale_of(stale_versions, principal.tenant)
        return _described(service, registry, full_name(principal.tenant, name), stale)

    return JSONResponse(await anyio.to_thread.run_sync(look))


@router.post("/{name}/promote", response_model=Moved, responses=problems(400, 404, 408, 409, 413, 422))
async def promote(name: str, body: Promote, request: Request, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Make a version the champion, and serve it if this server serves the name.

    It is loaded and probed first; 409 names the stage at which that failed, and then nothing has changed.
    """
    registry, name = _registry(service), full_name(principal.tenant, name)
    return await _move(
        request,
        service,
        registry,
        name,
        lambda: registry.resolve(f"{name}@{body.version}").ref,
        lambda: promotion.promote(registry.home, name, body.version, by="http"),
    )


@router.post("/{name}/merge", response_model=Merged, responses=problems(400, 404, 408, 409, 413, 422))
async def merge(name: str, body: Merge, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Serve the adapters of a name merged into a copy of their base, at the base's own speed, or apart from it again.

    The other form is loaded and probed beside the one that serves; 409 names the stage at which that failed, and then
    nothing has changed. It holds until the name is unloaded or the server ends.
    """
    slot = await service.names.find(name, principal)
    changed = await service.refresher.alone(partial(slot.merge, merged=body.merged))
    return JSONResponse({"name": slot.name, "merged": body.merged, "changed": changed, "served_version": _served(slot)})


@router.post("/{name}/rollback", response_model=Moved, responses=problems(400, 404, 409))
async def rollback(name: str, request: Request, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Make the champion before this one the champion again, and serve it if this server serves the name.

    It is loaded and probed first, as with a promotion.
    """
    registry, name = _registry(service), full_name(principal.tenant, name)

    def previous() -> str | None:
        version = registry.aliases(name).get(PREVIOUS)
        return f"{name}@{version}" if version else None

    return await _move(
        request, service, registry, name, previous, lambda: promotion.roll_back(registry.home, name, by="http")
    )


async def _move(
    request: Request,
    service: Service,
    registry: Registry,
    name: str,
    target: Callable[[], str | None],
    move: Callable[[], object],
) -> Response:
    """Load the target, then move the alias, then serve it; without a target `move` says why there is none."""
    slot = service.names.get(name)

    def load_and_move() -> None:
        ref = target()
        if slot is None or ref is None:
            move()
        else:
            slot.swap(ref, commit=move)

    try:
        await service.refresher.alone(load_and_move)
    except SwapFailed as error:
        message = f"{error} The champion has not moved, and {_served(slot) or 'nothing'} is still served."
        raise Refusal(409, message, error.code) from error
    if slot is not None:
        # Another process may have moved the champion meanwhile.
        await service.refresher.refresh(slot)
    champion = (await anyio.to_thread.run_sync(registry.aliases, name))["champion"]
    request.state.target = f"{name}@{champion}"
    return JSONResponse({"name": name, "champion": champion, "served_version": _served(slot)})


def _served(slot: Slot | None) -> str | None:
    current = slot.current if slot is not None else None
    return current.version.id if current is not None else None


def _registry(service: Service) -> Registry:
    if service.registry is None:
        raise Refusal(409, "This server has no registry. Start it on a home directory.", "no_registry")
    return service.registry


def _stale_of(stale_versions: StaleVersions | None, tenant: str) -> Mapping[str, Sequence[StaleFact]]:
    return {} if stale_versions is None else stale_versions.of(tenant)


def _described(
    service: Service, registry: Registry, name: str, stale: Mapping[str, Sequence[StaleFact]]
) -> dict[str, Any]:
    tainted = taints_of(registry.home.database, name)
    versions = [
        {
            "tainted": tainted.get(version.id, []),
            # Without the texts: who may list versions need not be one who may read memories.
            "stale": [{"memory": one.memory, "id": one.entry.id} for one in stale.get(version.ref, ())],
            "version": version.id,
            "path": shown_path(version),
            "created_at": timestamp(published_at(version)),
        }
        for version in registry.versions(name)
    ]
    slot = service.names.get(name)
    if not versions and slot is None:
        raise NotFound(
            f"There is no version of {name!r} in the registry. It has {', '.join(registry.names(parse_ref(name).tenant)) or 'none'}."
        )
    return {"name": name, "served_version": _served(slot), "aliases": registry.aliases(name), "versions": versions}
