"""The parametric-memory API, exactly as its users know it (rows 000-32 … 000-37)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.data.example import Message
from nightschool.engine.request import SamplingParams
from nightschool.engine.slot import Slot
from nightschool.server.bodies import AtLeastOne, Body, Number
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import refusals
from nightschool.server.errors import Refusal, model_not_loaded
from nightschool.server.generation import only_answer
from nightschool.server.recording import Exchange
from nightschool.server.service import (
    PrincipalOf,
    RequestId,
    Service,
    ServiceOf,
    is_public,
    owner_of,
    published_at,
    shown_path,
    timestamp,
)
from nightschool.server.submission import Ask
from nightschool.store.principal import Principal

router = APIRouter(tags=["Parametric memory"], route_class=BodyRoute)


class GenerateRequest(Body):
    """A question and how to answer it."""

    query: str = Field(..., min_length=1, description="The question.")
    max_new_tokens: AtLeastOne = Field(256, description="Most tokens of the answer.")
    temperature: Number = Field(0.7, ge=0, le=2, description="0 is greedy and deterministic; 1 is more creative.")
    top_p: Number = Field(0.9, gt=0, le=1, description="Sample from the smallest set of this probability.")
    model: str | None = Field(None, description="Which of the served names answers; the first one without it.")


class GenerateResponse(BaseModel):
    """The answer, and the version that gave it."""

    query: str
    response: str
    model_version: str = Field(..., description="Such as 20251202_115436; the header x-model-version has name@version.")
    timestamp: datetime


class Health(BaseModel):
    """Always 200, with or without a model."""

    status: Literal["healthy"]
    model_loaded: bool
    current_model_version: str | None
    current_model_path: str | None = Field(..., description="In the home, such as models/bot/20251202_115436.")
    timestamp: datetime
    device: Literal["cuda", "cpu"]


class AvailableModel(BaseModel):
    """A published version."""

    path: str
    version: str
    modified_time: datetime


class ModelInfo(BaseModel):
    """The version that is served, and what else there is."""

    current_model_version: str
    current_model_path: str
    tokenizer_vocab_size: int
    device: Literal["cuda", "cpu"]
    last_updated: datetime = Field(..., description="When the version was loaded.")
    available_models: list[AvailableModel] = Field(..., description="Newest first.")


class RefreshResponse(BaseModel):
    """What is served after the look."""

    status: Literal["success"]
    message: Literal["Model refresh completed"]
    current_model_version: str | None
    current_model_path: str | None
    timestamp: datetime


@router.post("/generate", response_model=GenerateResponse, responses=refusals(400, 404, 408, 413, 422, 429, 500, 503))
async def generate(
    body: GenerateRequest, request: Request, service: ServiceOf, request_id: RequestId, principal: PrincipalOf
) -> Response:
    """Answer one question. 503 while no model is loaded; 422 where a value is out of bounds."""
    if body.max_new_tokens > service.settings.max_new_tokens_limit:
        limit = service.settings.max_new_tokens_limit
        problem = {"type": "less_than_equal", "loc": ("body", "max_new_tokens"), "msg": f"At most {limit} are made."}
        raise RequestValidationError([problem])
    given = "max_new_tokens" in body.model_fields_set
    ask = Ask(
        prompts=[[Message("user", body.query)]],
        params=SamplingParams(max_new_tokens=1, temperature=body.temperature, top_p=body.top_p),
        max_new_tokens=body.max_new_tokens if given else None,
        default_max_new_tokens=body.max_new_tokens,
        model=body.model,
        principal=principal,
    )
    running = await service.answering.start(ask, request_id)
    answer = await only_answer(running, request)
    question = {"role": "user", "content": body.query}
    version = running.version
    service.recorder.keep(Exchange(request_id, version.name, version.id, [question], answer.text, owner_of(request)))
    content = {
        "query": body.query,
        "response": answer.text,
        "model_version": version.id,
        "timestamp": timestamp(),
    }
    return JSONResponse(content, headers=running.headers())


@router.get("/health", response_model=Health)
async def health(service: ServiceOf) -> Response:
    """Whether a version of the first name is loaded, and which. Always 200; see /readyz for a status that says so."""
    slot = service.names.first
    present = _present(service, slot)
    if not is_public(service, slot):
        present |= {"current_model_version": None, "current_model_path": None}
    return JSONResponse({"status": "healthy", "model_loaded": slot.current is not None} | present)


def _present(service: Service, slot: Slot) -> dict[str, Any]:
    current = slot.current
    return {
        "current_model_version": current.version.id if current else None,
        "current_model_path": shown_path(current.version) if current else None,
        "timestamp": timestamp(),
        "device": service.device,
    }


@router.get("/model_info", response_model=ModelInfo, responses=refusals(404, 503))
async def model_info(service: ServiceOf, principal: PrincipalOf, model: str | None = None) -> Response:
    """The version that is served and every published one, of the first name or of `model`. 503 while none is loaded."""
    slot = await service.names.find(model, principal)
    current = slot.current
    if current is None:
        raise model_not_loaded()
    available = await anyio.to_thread.run_sync(_available, service, slot.name)
    return JSONResponse(
        {
            "current_model_version": current.version.id,
            "current_model_path": shown_path(current.version),
            "tokenizer_vocab_size": len(current.tokenizer),
            "device": service.device,
            "last_updated": timestamp(current.loaded_at),
            "available_models": available,
        }
    )


def _available(service: Service, name: str) -> list[dict[str, str]]:
    versions = service.registry.versions(name) if service.registry is not None else []
    return [{"path": shown_path(v), "version": v.id, "modified_time": timestamp(published_at(v))} for v in versions]


async def _refresh(service: Service, principal: Principal, model: str | None) -> Response:
    slot = await service.names.find(model, principal)
    try:
        await service.refresher.refresh(slot)
    except Exception as error:  # logged and counted by the refresher; whatever it was, the old version still serves
        raise Refusal(500, f"Model refresh failed: {error}", "refresh_failed") from error
    present = _present(service, slot)
    del present["device"]
    return JSONResponse({"status": "success", "message": "Model refresh completed"} | present)


@router.get("/refresh_model", response_model=RefreshResponse, responses=refusals(403, 404, 500))
async def refresh_model(service: ServiceOf, principal: PrincipalOf, model: str | None = None) -> Response:
    """Look for a promoted version of the first name, or of `model`, now, and serve it. A failure changes nothing."""
    return await _refresh(service, principal, model)


@router.post("/refresh_model", response_model=RefreshResponse, responses=refusals(403, 404, 500))
async def refresh_model_by_post(service: ServiceOf, principal: PrincipalOf, model: str | None = None) -> Response:
    """The same as GET."""
    return await _refresh(service, principal, model)
