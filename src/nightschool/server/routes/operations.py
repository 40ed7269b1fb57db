"""What an operator, a load balancer or Prometheus asks."""

from __future__ import annotations

from typing import Literal

import anyio.to_thread
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from nightschool.server.error_schemas import problems, refusals
from nightschool.server.errors import model_not_loaded
from nightschool.server.service import ServiceOf

router = APIRouter(tags=["Operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """A model is loaded."""

    status: Literal["ready"]
    model: str = Field(..., description="name@version")


class Settings(BaseModel):
    """What this server was started with, and what went wrong last."""

    name: str
    record_conversations: bool
    model_check_interval_seconds: float
    max_body_bytes: int
    max_new_tokens_limit: int
    requests_per_minute: float | None
    api_key_needed: bool
    last_refresh_error: str | None = Field(..., description="Why the newest version is not served; null if it is.")


@router.get("/healthz", response_model=Alive)
async def healthz() -> Response:
    """Whether the process answers; it does while a model loads or generates."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses=refusals(503))
async def readyz(service: ServiceOf) -> Response:
    """503 until a model is loaded."""
    current = service.slot.current
    if current is None:
        raise model_not_loaded()
    return JSONResponse({"status": "ready", "model": current.version.ref})


@router.get(
    "/metrics",
    response_class=Response,
    responses={**refusals(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceOf) -> Response:
    """Counters for Prometheus. Needs the key where there is one, unless the server listens on loopback."""
    text = await anyio.to_thread.run_sync(service.metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/api/settings", response_model=Settings, responses=problems())
async def settings(service: ServiceOf) -> Response:
    """What this server was started with; never its keys."""
    chosen = service.settings
    return JSONResponse(
        {
            "name": service.slot.name,
            "record_conversations": service.recorder.on,
            "model_check_interval_seconds": chosen.model_check_interval,
            "max_body_bytes": chosen.max_body_bytes,
            "max_new_tokens_limit": chosen.max_new_tokens_limit,
            "requests_per_minute": chosen.requests_per_minute,
            "api_key_needed": bool(chosen.api_keys),
            "last_refresh_error": service.refresher.last_error,
        }
    )
