"""The models of an organisation, and answers from them (rows 001-24 … 001-28)."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from nightschool.data.example import Message
from nightschool.engine.request import SamplingParams
from nightschool.errors import NotFound
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import refusals
from nightschool.server.errors import Refusal
from nightschool.server.generation import only_answer
from nightschool.server.recording import Exchange
from nightschool.server.service import PrincipalOf, RequestId, ServiceOf
from nightschool.server.submission import Ask
from nightschool.server.training_service.organisation import (
    LATEST,
    asker_for,
    created_at,
    described,
    metadata_of,
    name_of,
    training_ids,
    version_of,
)
from nightschool.server.training_service.parts import TrainingOf, TrainingService
from nightschool.server.training_service.schemas import (
    Generated,
    ListedModels,
    Loaded,
    MessageRequest,
    ModelDescription,
    OrgId,
    Unloaded,
)
from nightschool.store.versions import Version

router = APIRouter(prefix="/api/v1", tags=["Training service"], route_class=BodyRoute)

Organisation = Annotated[OrgId, Query()]
ModelId = Annotated[str, Query(min_length=1, max_length=64, description="latest, a training id, or a version's id.")]


@router.post("/generate", response_model=Generated, responses=refusals(400, 404, 408, 413, 422, 429, 500, 503))
async def generate(
    org_id: Organisation,
    body: MessageRequest,
    request: Request,
    service: ServiceOf,
    training: TrainingOf,
    request_id: RequestId,
    principal: PrincipalOf,
) -> Response:
    """Answer a message with the model of an organisation, which is loaded if it is not."""
    asker, defaults, limit = asker_for(org_id, principal), training.settings, service.settings.max_new_tokens_limit
    if body.max_tokens is not None and body.max_tokens > limit:
        message = f"max_tokens is {body.max_tokens}, and this server makes at most {limit}. Ask for fewer."
        raise Refusal(400, message, "invalid_value", param="max_tokens")
    messages = [*([Message("system", body.system_prompt)] if body.system_prompt else [])]
    messages += [*(turn.message for turn in body.history or ()), Message("user", body.message)]
    ask = Ask(
        prompts=[messages],
        params=SamplingParams(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=defaults.top_k if body.top_k is None else body.top_k,
        ),
        max_new_tokens=body.max_tokens,
        default_max_new_tokens=min(defaults.max_new_tokens, limit),
        model=_served_key(training, org_id),
        principal=asker,
    )
    running = await service.answering.start(ask, request_id)
    answer = await only_answer(running, request)
    version = running.version
    turns = [{"role": message.role, "content": message.content} for message in messages]
    service.recorder.keep(Exchange(request_id, version.name, version.id, turns, answer.text, asker.key))
    info = await anyio.to_thread.run_sync(_described, training, version, org_id)
    content = {"response": answer.text, "model_info": info}
    return JSONResponse(content, headers=running.headers())


@router.post("/models/load", response_model=Loaded, responses=refusals(400, 404, 408, 409, 413, 422, 500))
async def load(
    org_id: Organisation,
    service: ServiceOf,
    training: TrainingOf,
    principal: PrincipalOf,
    model_id: ModelId = LATEST,
) -> Response:
    """Load a model. It answers for its organisation until another one is loaded, or it is unloaded."""
    asker_for(org_id, principal)
    try:
        wanted = await anyio.to_thread.run_sync(version_of, training, org_id, model_id)
        key = name_of(org_id) if model_id == LATEST else wanted.ref
        slot = await service.names.load(key)
    except NotFound:
        raise Refusal(404, f"Failed to load model for org {org_id}", "not_found", param="model_id") from None
    before = training.chosen.pop(org_id, None)
    if model_id != LATEST:
        training.chosen[org_id] = key
    if before not in (None, key):
        await service.names.unload(before)
    assert slot.current is not None, "a slot that is loaded serves a version"
    info = await anyio.to_thread.run_sync(_described, training, slot.current.version, org_id)
    return JSONResponse({"message": "Model loaded successfully", "model_info": info})


@router.post("/models/unload", response_model=Unloaded, responses=refusals(400, 408, 409, 413, 422))
async def unload(org_id: Organisation, service: ServiceOf, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Give the room of an organisation's model back once it has answered what it took; nothing happens if none is loaded."""
    asker_for(org_id, principal)
    for key in filter(None, (training.chosen.pop(org_id, None), name_of(org_id))):
        await service.names.unload(key)
    return JSONResponse({"message": "Model unloaded successfully", "org_id": org_id})


@router.get("/models/{org_id}/info", response_model=ModelDescription, responses=refusals(400, 404, 422))
async def info(org_id: OrgId, service: ServiceOf, training: TrainingOf, principal: PrincipalOf) -> Response:
    """The model that is loaded for an organisation."""
    asker_for(org_id, principal)
    slot = service.names.get(_served_key(training, org_id))
    if slot is None or slot.current is None:
        raise Refusal(404, f"No model loaded for org {org_id}", "not_loaded")
    return JSONResponse(await anyio.to_thread.run_sync(_described, training, slot.current.version, org_id))


@router.get("/models/{org_id}/list", response_model=ListedModels, responses=refusals(400, 422))
async def ls(org_id: OrgId, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Every model of an organisation, newest first, with the jobs that made them; those that were refused, too."""
    asker_for(org_id, principal)

    def listed() -> list[dict[str, Any]]:
        ids = training_ids(training, org_id)
        champion = training.registry.champion(name_of(org_id))
        return [
            {
                "model_id": version.id,
                "created_at": created_at(version),
                "metadata": metadata_of(version, ids.get(version.ref))
                | {"is_latest": champion is not None and version.id == champion.id},
            }
            for version in training.registry.versions(name_of(org_id))
        ]

    models = await anyio.to_thread.run_sync(listed)
    return JSONResponse({"org_id": org_id, "models": models, "count": len(models)})


def _served_key(training: TrainingService, org_id: str) -> str:
    """What answers for an organisation: what it loaded by its id, else whatever is promoted."""
    return training.chosen.get(org_id, name_of(org_id))


def _described(training: TrainingService, version: Version, org_id: str) -> dict[str, Any]:
    return described(version, org_id, training_id=training_ids(training, org_id).get(version.ref), loaded=True)
