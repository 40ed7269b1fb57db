"""What an operator, a load balancer or Prometheus asks."""

from __future__ import annotations

from typing import Literal

import anyio.to_thread
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from nightschool.errors import NotFound
from nightschool.server.error_schemas import problems, refusals
from nightschool.server.errors import model_not_loaded
from nightschool.server.service import PrincipalOf, ServiceOf, is_public

router = APIRouter(tags=["Operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """A version of every name that the server was given is loaded; one that loads on demand is ready at once."""

    status: Literal["ready"]
    model: str | None = Field(..., description="name@version of the first name that is loaded.")
    models: list[str] = Field(..., description="The same of every name.")


class ServedModel(BaseModel):
    """A name that this server answers for."""

    name: str
    served_version: str | None = Field(..., description="Null until one is loaded.")
    last_refresh_error: str | None = Field(..., description="Why the newest version is not served; null if it is.")


class Settings(BaseModel):
    """What this server was started with, and what went wrong last."""

    name: str = Field(..., description="The first of `models`, which answers where no model is named.")
    models: list[ServedModel] = Field(..., description="Those that are loaded, where names are loaded on demand.")
    max_loaded_names: int | None = Field(..., description="Null where nothing is loaded on demand.")
    max_loaded_bytes: int | None
    max_host_bytes: int
    experts_resident: int | None = Field(..., description="Of mixtures, in memory at a time; null is all.")
    record_conversations: bool
    model_check_interval_seconds: float
    max_body_bytes: int
    max_new_tokens_limit: int
    requests_per_minute: float | None
    api_key_needed: bool
    last_refresh_error: str | None = Field(..., description="Of the first name.")


@router.get("/healthz", response_model=Alive)
async def healthz() -> Response:
    """Whether the process answers; it does while a model loads or generates."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses=refusals(503))
async def readyz(service: ServiceOf) -> Response:
    """503 until a version of every name is loaded that the server was given. With keys, it names no other tenant's."""
    if any(slot.current is None for slot in service.names.needed):
        raise model_not_loaded()
    shown = [slot for slot in service.names if is_public(service, slot)]
    loaded = [slot.current.version.ref for slot in shown if slot.current is not None]
    return JSONResponse({"status": "ready", "model": next(iter(loaded), None), "models": loaded})


@router.get(
    "/metrics",
    response_class=Response,
    responses={**refusals(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceOf) -> Response:
    """Counters for Prometheus. Needs the key where there is one, unless the server listens on loopback; other tenants' keys won't do."""
    text = await anyio.to_thread.run_sync(service.metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/api/settings", response_model=Settings, responses=problems(404))
async def settings(service: ServiceOf, principal: PrincipalOf) -> Response:
    """What this server was started with; never its keys."""
    chosen, slots = service.settings, service.names.of(principal.tenant)
    if not slots:
        raise NotFound("Nothing is served to you here. Ask for a model first, or have one trained.")
    first = slots[0]
    models = [
        {
            "name": slot.name,
            "served_version": slot.current.version.id if slot.current is not None else None,
            "last_refresh_error": service.refresher.last_error(slot.name),
        }
        for slot in slots
    ]
    return JSONResponse(
        {
            "name": first.name,
            "models": models,
            "max_loaded_names": chosen.max_loaded_names if service.names.on_demand is not None else None,
            "max_loaded_bytes": chosen.max_loaded_bytes,
            "max_host_bytes": chosen.max_host_bytes,
            "experts_resident": chosen.experts_resident,
            "record_conversations": service.recorder.on,
            "model_check_interval_seconds": chosen.model_check_interval,
            "max_body_bytes": chosen.max_body_bytes,
            "max_new_tokens_limit": chosen.max_new_tokens_limit,
            "requests_per_minute": chosen.requests_per_minute,
            "api_key_needed": service.access.keyring.was_needed,
            "last_refresh_error": service.refresher.last_error(first.name),
        }
    )
