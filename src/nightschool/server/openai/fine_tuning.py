"""`/v1/fine_tuning/jobs`, for unmodified clients of OpenAI."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from nightschool.errors import Conflict
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import openai_refusals
from nightschool.server.errors import Refusal
from nightschool.server.openai.job_objects import checkpoints_of, events_of, job_object
from nightschool.server.openai.job_schema import CheckpointList, CreateJob, EventList, FineTuningJob, JobList
from nightschool.server.openai.model_names import SOURCE
from nightschool.server.openai.new_job import create_job
from nightschool.server.openai.pages import MOST_ON_A_PAGE, After, page
from nightschool.server.service import PrincipalOf
from nightschool.server.training_service.parts import TrainingOf, TrainingService
from nightschool.store.job_queue import Job
from nightschool.store.principal import Principal

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI-compatible"], route_class=BodyRoute)
Limit = Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE, description="Most of them on a page.")]
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


@router.post("", response_model=FineTuningJob, responses=openai_refusals(400, 404, 408, 413))
async def create(body: CreateJob, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Queue a job. It copies its files; a worker trains, and publishes a model under a name of its own."""
    return await _shown(training, lambda: create_job(training, body, principal))


@router.get("", response_model=JobList, responses=openai_refusals(400, 404))
async def jobs(
    request: Request, training: TrainingOf, principal: PrincipalOf, limit: Limit = 20, after: After = None
) -> Response:
    """The jobs that came through this API, newest first; with `metadata[KEY]=VALUE` those that were given it."""
    wanted = {match[1]: value for key, value in request.query_params.items() if (match := _METADATA.fullmatch(key))}

    def look() -> Response:
        own = training.queue.ls(tenant=principal.tenant)
        rows = [job for job in own if job.source == SOURCE and _has(job, wanted)]
        return page(rows, lambda job: job_object(training.home, job), after=after, limit=limit)

    return await anyio.to_thread.run_sync(look)


@router.get("/{job_id}", response_model=FineTuningJob, responses=openai_refusals(404))
async def job(job_id: str, training: TrainingOf, principal: PrincipalOf) -> Response:
    """One job."""
    return await _shown(training, lambda: _job(training, job_id, principal))


@router.post("/{job_id}/cancel", response_model=FineTuningJob, responses=openai_refusals(400, 404, 408, 413))
async def cancel(job_id: str, training: TrainingOf, principal: PrincipalOf) -> Response:
    """End a job; one that runs is `cancelled` as soon as its process has stopped."""
    return await _changed(training, job_id, principal, training.queue.request_cancel)


@router.post("/{job_id}/pause", response_model=FineTuningJob, responses=openai_refusals(400, 404, 408, 413))
async def pause(job_id: str, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Let a job wait; one that runs saves its state first, and is `paused` once it has."""
    return await _changed(training, job_id, principal, training.queue.pause)


@router.post("/{job_id}/resume", response_model=FineTuningJob, responses=openai_refusals(400, 404, 408, 413))
async def resume(job_id: str, training: TrainingOf, principal: PrincipalOf) -> Response:
    """Let a paused job go on where it stopped."""
    return await _changed(training, job_id, principal, training.queue.resume)


@router.get("/{job_id}/events", response_model=EventList, responses=openai_refusals(400, 404))
async def events(
    job_id: str, training: TrainingOf, principal: PrincipalOf, limit: Limit = 20, after: After = None
) -> Response:
    """What happened to a job, newest first: its steps with their figures, its checkpoints, its end."""

    def look() -> Response:
        rows = events_of(training.home, _job(training, job_id, principal))
        return page(rows, lambda row: row, after=after, limit=limit, id_of=lambda row: str(row["id"]))

    return await anyio.to_thread.run_sync(look)


@router.get("/{job_id}/checkpoints", response_model=CheckpointList, responses=openai_refusals(400, 404))
async def checkpoints(
    job_id: str, training: TrainingOf, principal: PrincipalOf, limit: Limit = 10, after: After = None
) -> Response:
    """The checkpoints of a job that can be asked: those of its last three epochs, newest first."""

    def look() -> Response:
        rows = checkpoints_of(training.home, _job(training, job_id, principal))
        return page(rows, lambda row: row, after=after, limit=limit, id_of=lambda row: str(row["id"]))

    return await anyio.to_thread.run_sync(look)


def _job(training: TrainingService, job_id: str, principal: Principal) -> Job:
    """A tenant's job. Raises NotFound for another tenant's, and Refusal for one that came another way."""
    found = training.queue.get(job_id, tenant=principal.tenant)
    if found.source != SOURCE:
        message = f"The job {job_id} was not made through this API. Look at it with nightschool jobs show {job_id}."
        raise Refusal(404, message, "not_found", param="fine_tuning_job_id")
    return found


async def _changed(
    training: TrainingService, job_id: str, principal: Principal, change: Callable[..., Job]
) -> Response:
    def ask() -> Job:
        _job(training, job_id, principal)
        try:
            return change(job_id, tenant=principal.tenant)
        except Conflict as error:
            # OpenAI's clients try again after 409, and it would not help.
            raise Refusal(400, str(error), "invalid_state") from None

    return await _shown(training, ask)


async def _shown(training: TrainingService, ask: Callable[[], Job]) -> Response:
    def look() -> dict[str, Any]:
        return job_object(training.home, ask())

    return JSONResponse(await anyio.to_thread.run_sync(look))


def _has(job: Job, wanted: dict[str, str]) -> bool:
    given = job.metadata.get("metadata") or {}
    return all(given.get(key) == value for key, value in wanted.items())
