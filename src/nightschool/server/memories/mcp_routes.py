"""Memories for clients of the Model Context Protocol over HTTP: one message a request, without sessions."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from nightschool.memory.graph import KnowledgeGraph
from nightschool.memory.mcp import HttpAnswer, Served, Why, http_server
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import json_rpc_refusals
from nightschool.server.memories import schemas
from nightschool.server.memories.access import MemoriesOf, author_of
from nightschool.server.memories.mcp_why import explained
from nightschool.server.memories.opened import Memories
from nightschool.server.service import PrincipalOf, RequestId, ServiceOf
from nightschool.store.principal import Principal

router = APIRouter(prefix="/mcp", tags=["Explicit memory"], route_class=BodyRoute)
_AT_ONCE = 32


def threads() -> anyio.CapacityLimiter:
    """Where messages are answered. A tool may wait for a model, which takes threads of the others' pool: it must not have all of them."""
    return anyio.CapacityLimiter(_AT_ONCE)


def _threads(request: Request) -> anyio.CapacityLimiter:
    limiter = request.app.state.mcp_threads
    assert isinstance(limiter, anyio.CapacityLimiter)
    return limiter


@router.post(
    "/{name}",
    response_model=schemas.McpAnswer,
    responses={
        **json_rpc_refusals(400, 404, 406, 408, 409, 413, 422, 501, 507),
        202: {"description": "A notification was taken."},
    },
)
async def message(
    name: str,
    body: schemas.McpMessage,
    request: Request,
    service: ServiceOf,
    memories: MemoriesOf,
    principal: PrincipalOf,
    request_id: RequestId,
    limiter: Annotated[anyio.CapacityLimiter, Depends(_threads)],
) -> Response:
    """One message of the Model Context Protocol's streamable HTTP, about a memory; its answer is JSON, and there are no sessions.

    The tools are those of `nightschool memory mcp`. `why` needs a key that may ask models, too.
    """
    loop = asyncio.get_running_loop()

    def why(question: str, model: str | None, max_new_tokens: int) -> dict[str, Any]:
        asking = explained(service, principal, request, request_id, name, question, model, max_new_tokens)
        return asyncio.run_coroutine_threadsafe(asking, loop).result()

    answer, request.state.changed = await anyio.to_thread.run_sync(
        partial(_answered, memories, principal, name, why, dict(request.scope), body), limiter=limiter
    )
    return Response(answer.body, answer.status, answer.headers)


def _answered(
    memories: Memories, principal: Principal, name: str, why: Why, scope: dict[str, Any], body: schemas.McpMessage
) -> tuple[HttpAnswer, bool]:
    """The answer, and whether something was written for it."""
    server = http_server()
    graph = KnowledgeGraph(memories.store(principal.tenant, name), author_of(principal))
    answer = server.answer(Served(graph, why), scope, body.model_dump_json(exclude_unset=True).encode())
    return answer, graph.changed
