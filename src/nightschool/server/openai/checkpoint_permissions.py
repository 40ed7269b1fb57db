"""`/v1/fine_tuning/checkpoints/{model}/permissions`: a tenant lets others ask a model that it has fine-tuned.

OpenAI's projects are tenants here. A permission lets the other tenant's keys ask this one model by its `ft:…` name, and nothing
else: not train from it, not list it, not see its job or files. Such answers are counted and bounded as the asker's own,
share no cached prefix with the owner's, and are not kept for anybody's night.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.server.bodies import Body, bounded
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import openai_refusals
from nightschool.server.errors import Refusal
from nightschool.server.openai.model_names import fine_tuned
from nightschool.server.openai.pages import After, page, page_of
from nightschool.server.service import PrincipalOf
from nightschool.server.training_service.parts import TrainingOf, TrainingService
from nightschool.store.checkpoint_permissions import CheckpointPermissions, FineTuned, Permission
from nightschool.store.names import check_name, full_name
from nightschool.store.principal import Principal
from nightschool.store.registry import Registry

router = APIRouter(
    prefix="/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions",
    tags=["OpenAI-compatible"],
    route_class=BodyRoute,
)
Result = TypeVar("Result")
_MOST_AT_ONCE = 100
Project = Annotated[str, Field(min_length=1, max_length=64)]


class CreatePermissions(Body):
    """Who may ask the model from now on."""

    project_ids: Annotated[list[Project], bounded(_MOST_AT_ONCE)] = Field(..., description="Names of other tenants.")


class CheckpointPermission(BaseModel):
    """That a tenant may ask the model."""

    id: str
    object: Literal["checkpoint.permission"]
    created_at: int = Field(..., description="Seconds since 1970.")
    project_id: str


class CheckpointPermissionList(BaseModel):
    """A page of permissions."""

    object: Literal["list"]
    data: list[CheckpointPermission]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedPermission(BaseModel):
    """It is gone."""

    id: str
    object: Literal["checkpoint.permission"]
    deleted: bool


@router.post("", response_model=CheckpointPermissionList, responses=openai_refusals(400, 404, 408, 409, 413))
async def create(
    fine_tuned_model_checkpoint: str, body: CreatePermissions, training: TrainingOf, principal: PrincipalOf
) -> Response:
    """Let other tenants ask the model. Whether there is a tenant of a name is not told; who may already keeps its permission."""

    def grant(store: CheckpointPermissions, model: FineTuned) -> list[Permission]:
        for project in body.project_ids:
            _refuse(project, model)
        return store.grant(model, body.project_ids)

    made = await _do(training, fine_tuned_model_checkpoint, principal, grant)
    return page_of([_shown(one) for one in made], has_more=False)


@router.get("", response_model=CheckpointPermissionList, responses=openai_refusals(400, 404))
async def ls(
    fine_tuned_model_checkpoint: str,
    training: TrainingOf,
    principal: PrincipalOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most of them on a page.")] = 10,
    order: Annotated[
        Literal["ascending", "descending"], Query(description="By the time when they were made.")
    ] = "descending",
    project_id: Annotated[str | None, Query(max_length=64, description="Only that of one tenant.")] = None,
) -> Response:
    """Who may ask the model."""
    found = await _do(training, fine_tuned_model_checkpoint, principal, lambda store, model: store.ls(model))
    rows = [one for one in found if project_id in (None, one.project)]
    return page(rows if order == "ascending" else rows[::-1], _shown, after=after, limit=limit)


@router.delete("/{permission_id}", response_model=DeletedPermission, responses=openai_refusals(400, 404))
async def delete(
    fine_tuned_model_checkpoint: str, permission_id: str, training: TrainingOf, principal: PrincipalOf
) -> Response:
    """Take a permission back, from the next request on."""
    await _do(training, fine_tuned_model_checkpoint, principal, lambda store, model: store.revoke(model, permission_id))
    return JSONResponse({"id": permission_id, "object": "checkpoint.permission", "deleted": True})


async def _do(
    training: TrainingService,
    text: str,
    principal: Principal,
    what: Callable[[CheckpointPermissions, FineTuned], Result],
) -> Result:
    """Look for the tenant's own model, and do something with its permissions. Another tenant's is as if absent."""

    def look() -> Result:
        model = fine_tuned(text)
        if model is None or model.tenant != principal.tenant or not _is_there(training.registry, model):
            message = f"There is no fine-tuned model {text[:200]!r} here. GET /v1/models lists them."
            raise Refusal(404, message, "not_found", param="fine_tuned_model_checkpoint")
        try:
            return what(CheckpointPermissions(training.home.database), model)
        except Conflict as error:
            # OpenAI's clients try again after 409, and it would not help.
            raise Refusal(400, str(error), "invalid_state") from None

    return await anyio.to_thread.run_sync(look)


def _is_there(registry: Registry, model: FineTuned) -> bool:
    name = full_name(model.tenant, model.name)
    try:
        registry.resolve(f"{name}@{model.pointer}")
    except NotFound:
        return False
    return True


def _refuse(project: str, model: FineTuned) -> None:
    """Raise Refusal for what is no tenant, or is the owner."""
    try:
        check_name(project, what="project")
    except NameRefused as error:
        raise Refusal(400, str(error), "invalid_value", param="project_ids") from None
    if project == model.tenant:
        raise Refusal(400, f"{project!r} owns the model, and may ask it anyway.", "invalid_value", param="project_ids")


def _shown(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": int(permission.created_at.timestamp()),
        "project_id": permission.project,
    }
