"""Webhook endpoints as `client.webhooks` of OpenAI's client makes and changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from nightschool.errors import Unreachable
from nightschool.events import now
from nightschool.server.bodies import Body, Flag, bounded
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import openai_refusals
from nightschool.server.errors import Refusal
from nightschool.server.service import PrincipalOf, Service, ServiceOf
from nightschool.store.outbox import EVENT_TYPES, EventType
from nightschool.webhooks.endpoints import Endpoint, Endpoints
from nightschool.webhooks.sender import send

router = APIRouter(prefix="/v1", tags=["Webhooks"], route_class=BodyRoute)
Result = TypeVar("Result")

Name = Annotated[str, Field(min_length=1, max_length=200, description="For people.")]
Url = Annotated[str, Field(min_length=1, max_length=2048, description="A public https address.")]
Types = Annotated[list[EventType], bounded(len(EVENT_TYPES))]


class CreateEndpoint(Body):
    """A new endpoint."""

    name: Name
    url: Url
    event_types: Types = Field(..., description="What it is told of.")


class UpdateEndpoint(Body):
    """What changes; the rest stays."""

    name: Name | None = Field(None, description="For people.")
    url: Url | None = Field(None, description="A public https address.")
    event_types: Types | None = Field(None, description="All that it is told of from now on.")


class RotateSecret(Body):
    """How the old secret ends."""

    keep_old_secret_active_for_24_hours: Flag = Field(
        default=False, description="Sign with both for a day, so that receivers can change over."
    )


class TestEndpoint(Body):
    """Which event to make up."""

    event_type: EventType = Field(..., description="Its type.")


class WebhookEndpoint(BaseModel):
    """An endpoint. `disabled` once it answered 410; any change enables it again."""

    id: str
    object: Literal["webhook_endpoint"]
    name: str
    url: str
    event_types: list[EventType]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    disabled: bool


class WebhookEndpointWithSecret(WebhookEndpoint):
    """An endpoint with its secret, which is shown this once."""

    signing_secret: str


class WebhookEndpoints(BaseModel):
    """A page of endpoints, newest first."""

    object: Literal["list"]
    data: list[WebhookEndpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedEndpoint(BaseModel):
    """It is gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: bool


class TestResult(BaseModel):
    """What the endpoint answered to a made-up event."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: EventType
    status_code: int
    success: Literal[True]


class EventTypes(BaseModel):
    """What one can be told of."""

    object: Literal["list"]
    data: list[EventType]


@router.get("/webhook_event_types", response_model=EventTypes, responses=openai_refusals())
async def event_types() -> Response:
    """The types of events that an endpoint can want."""
    return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})


@router.post(
    "/webhook_endpoints", response_model=WebhookEndpointWithSecret, responses=openai_refusals(400, 408, 409, 413)
)
async def create(body: CreateEndpoint, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Add an endpoint. Its secret is in the answer, this once."""
    made = await _do(
        service,
        lambda store: store.create(principal.tenant, name=body.name, url=body.url, event_types=body.event_types),
    )
    return JSONResponse(_with_secret(made))


@router.get("/webhook_endpoints", response_model=WebhookEndpoints, responses=openai_refusals(400, 404))
async def ls(
    service: ServiceOf,
    principal: PrincipalOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """The tenant's endpoints, newest first; `after` is the last one of the page before."""
    found = await _do(service, lambda store: store.ls(principal.tenant))
    if after is not None:
        places = [place for place, one in enumerate(found) if one.id == after]
        if not places:
            raise Refusal(
                404, f"There is no webhook endpoint {after[:100]!r} to go on after.", "not_found", param="after"
            )
        found = found[places[0] + 1 :]
    page = [_shown(one) for one in found[:limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit} | ends)


@router.get("/webhook_endpoints/{endpoint_id}", response_model=WebhookEndpoint, responses=openai_refusals(400, 404))
async def retrieve(endpoint_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """One endpoint."""
    return JSONResponse(_shown(await _do(service, lambda store: store.get(principal.tenant, endpoint_id))))


@router.post(
    "/webhook_endpoints/{endpoint_id}", response_model=WebhookEndpoint, responses=openai_refusals(400, 404, 408, 413)
)
async def update(endpoint_id: str, body: UpdateEndpoint, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Change an endpoint."""
    changed = await _do(
        service,
        lambda store: store.update(
            principal.tenant, endpoint_id, name=body.name, url=body.url, event_types=body.event_types
        ),
    )
    return JSONResponse(_shown(changed))


@router.delete("/webhook_endpoints/{endpoint_id}", response_model=DeletedEndpoint, responses=openai_refusals(400, 404))
async def delete(endpoint_id: str, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Remove an endpoint, and what waits to be sent to it."""
    await _do(service, lambda store: store.delete(principal.tenant, endpoint_id))
    return JSONResponse({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret",
    response_model=WebhookEndpointWithSecret,
    responses=openai_refusals(400, 404, 408, 413),
)
async def rotate_secret(endpoint_id: str, body: RotateSecret, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Sign with a new secret, which is in the answer, this once."""
    keep_old = body.keep_old_secret_active_for_24_hours
    changed = await _do(service, lambda store: store.rotate_secret(principal.tenant, endpoint_id, keep_old=keep_old))
    return JSONResponse(_with_secret(changed))


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    response_model=TestResult,
    responses=openai_refusals(400, 404, 408, 413),
)
async def test(endpoint_id: str, body: TestEndpoint, service: ServiceOf, principal: PrincipalOf) -> Response:
    """Send a made-up event now, once. 400 if there is no answer."""
    endpoint = await _do(service, lambda store: store.get(principal.tenant, endpoint_id))
    event = {
        "id": "evt_test",
        "object": "event",
        "created_at": int(now().timestamp()),
        "type": body.event_type,
        "data": {"id": "test"},
    }
    try:
        reply = await anyio.to_thread.run_sync(send, endpoint, "evt_test", json.dumps(event))
    except Unreachable as error:
        raise Refusal(400, str(error), "webhook_unreachable", param="url") from error
    return JSONResponse(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint.id,
            "event_type": body.event_type,
            "status_code": reply.status,
            "success": True,
        }
    )


async def _do(service: Service, what: Callable[[Endpoints], Result]) -> Result:
    if service.registry is None:
        raise Refusal(409, "This server has no home to keep webhooks in. Start it on a home directory.", "no_registry")
    store = Endpoints(service.registry.home.database)
    return await anyio.to_thread.run_sync(what, store)


def _shown(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
        "signing_secret_hint": endpoint.secret_hint,
        "disabled": endpoint.disabled_at is not None,
    }


def _with_secret(endpoint: Endpoint) -> dict[str, Any]:
    return _shown(endpoint) | {"signing_secret": endpoint.secret}
