"""Training jobs: begin one, look at it, stop it; look at what it would train before that (rows 001-19 … 001-23)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import refusals
from nightschool.server.errors import Refusal
from nightschool.server.generation import while_connected
from nightschool.server.service import PrincipalOf
from nightschool.server.training_service.new_job import JobDraft, draft_job, submit_job
from nightschool.server.training_service.organisation import asker_for
from nightschool.server.training_service.parts import TrainingOf, TrainingService
from nightschool.server.training_service.schemas import (
    Cancelled,
    OrgId,
    Preview,
    TrainingData,
    TrainingJobs,
    TrainingStatus,
)
from nightschool.server.training_service.status import job_status
from nightschool.store.principal import Principal
from nightschool.store.runs import recipe_yaml
from nightschool.views.jobs import find_job, job_view, job_views

router = APIRouter(prefix="/api/v1/training", tags=["Training service"], route_class=BodyRoute)

TrainingId = Annotated[str, InPath(max_length=64, description="Such as train_0123456789ab.")]


@router.post("/start", response_model=TrainingStatus, responses=refusals(400, 408, 413, 422, 429, 507))
async def start(data: TrainingData, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Queue a job that trains an adapter on conversations. A worker begins it as soon as one is free."""
    asker = asker_for(data.org_id, principal)

    def begin() -> dict[str, Any]:
        job = submit_job(training, draft_job(training, data, data.org_id), created_by=asker.key)
        return job_status(training, job_view(training.home, job))

    return JSONResponse(await anyio.to_thread.run_sync(begin))


@router.post("/preview", response_model=Preview, responses=refusals(400, 404, 408, 413, 422, 429))
async def preview(data: TrainingData, training: TrainingOf, principal: PrincipalOf, request: Request) -> Response:
    """Say what a job would train: tokens, time, bytes, and which tokens of the first conversations carry loss.

    Takes what `start` takes. Nothing is queued, trained or kept.
    """
    asker_for(data.org_id, principal)
    draft = await anyio.to_thread.run_sync(draft_job, training, data, data.org_id)
    return JSONResponse(await while_connected(request.receive, _previewed(training, draft)))


async def _previewed(training: TrainingService, draft: JobDraft) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        await anyio.to_thread.run_sync(_write_draft, draft, place)
        plan = await training.children.run("cli", "plan", "recipe.yaml", "--json", home=training.home, cwd=place)
    return {
        "num_conversations": draft.metadata["num_conversations"],
        "num_held_out": draft.metadata["num_held_out"],
        "repairs": draft.metadata["repairs"],
        "base_model": draft.metadata["base_model"],
        **{name: plan[name] for name in Preview.model_fields if name in plan},
        "findings": plan.get("notes") or [],
    }


def _write_draft(draft: JobDraft, folder: Path) -> None:
    draft.write_data(folder)
    (folder / "recipe.yaml").write_text(recipe_yaml(draft.recipe.as_plain()), "utf-8")


@router.get("/status/{training_id}", response_model=TrainingStatus, responses=refusals(404))
async def status(training_id: TrainingId, training: TrainingOf, principal: PrincipalOf) -> Response:
    """How far a job is."""
    return JSONResponse(await _of_job(training, training_id, principal))


@router.get("/jobs/{org_id}", response_model=TrainingJobs, responses=refusals(400, 422))
async def jobs(org_id: OrgId, training: TrainingOf, principal: PrincipalOf) -> Response:
    """The jobs of an organisation, newest first, and runs that were started without one; none if nobody knows it."""
    asker_for(org_id, principal)

    def look() -> list[dict[str, Any]]:
        return [job_status(training, job) for job in job_views(training.home, training.queue, org_id)]

    return JSONResponse({"jobs": await anyio.to_thread.run_sync(look)})


@router.delete("/jobs/{training_id}", response_model=Cancelled, responses=refusals(400, 404))
async def cancel(training_id: TrainingId, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Stop a job: at once where it waits, within its step where it trains. What it had published stays."""

    def request_cancel(tenant: str | None) -> None:
        try:
            training.queue.request_cancel(training_id, tenant=tenant)
        except Conflict:
            state = training.queue.get(training_id, tenant=tenant).state
            if state != "cancelled":
                raise Refusal(400, f"Cannot cancel {state} job", "conflict") from None

    await _of_job(training, training_id, principal, request_cancel)
    return JSONResponse({"message": "Training job cancelled", "training_id": training_id})


async def _of_job(
    training: TrainingService,
    training_id: str,
    principal: Principal,
    act: Callable[[str | None], None] | None = None,
) -> dict[str, Any]:
    """The status of a job after `act` on it. Another tenant's job is as absent as one that never was."""

    def acted() -> dict[str, Any]:
        tenant = None if principal.key is None else principal.tenant
        try:
            if act is not None:
                act(tenant)
            return job_status(training, find_job(training.home, training.queue, training_id, tenant))
        except (NotFound, NameRefused):
            raise Refusal(404, "Training job not found", "not_found") from None

    return await anyio.to_thread.run_sync(acted)
