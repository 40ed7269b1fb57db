"""Memories for mem0's `MemoryClient`: the host that it is given names a memory, and its ids those beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from nightschool.errors import UsageError
from nightschool.memory.entity_ids import KINDS, EntityIds
from nightschool.memory.entry_events import events_of_entry, events_of_write
from nightschool.memory.store.search import share_of_words
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import refusals
from nightschool.server.memories import mem0_schemas as schemas
from nightschool.server.memories.access import MemoriesOf, author_of
from nightschool.server.memories.mem0_objects import Mem0Memory, made_for_ids, memory_of_ids, memory_with
from nightschool.server.memories.opened import Memories
from nightschool.server.service import PrincipalOf
from nightschool.store.principal import Principal

router = APIRouter(prefix="/mem0/{name}", tags=["Explicit memory, for mem0's client"], route_class=BodyRoute)
_READS = refusals(400, 404, 409)
_WRITES = refusals(400, 404, 408, 409, 413, 422, 507)
_TOP_K = 10


async def _answered(work: Callable[[], Any]) -> Response:
    return JSONResponse(await anyio.to_thread.run_sync(work))


@router.get("/v1/ping/", response_model=schemas.Pong, responses=_READS)
async def ping(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Whether the memory is there and the key may use it; a client asks it first of all."""

    def look() -> dict[str, Any]:
        memories.layers(principal.tenant, name)
        return {"status": "ok", "org_id": principal.tenant, "project_id": name}

    return await _answered(look)


@router.post("/v3/memories/add/", response_model=schemas.MemoryEvents, responses=_WRITES)
async def add(
    name: str, body: schemas.NewMemories, request: Request, memories: MemoriesOf, principal: PrincipalOf
) -> Response:
    """Remember what messages say, all or none, in the memory of the ids, which is made by the first of them.

    Sentences are taken apart by rules, and kept as they are where the rules cannot tell; no model extracts anything.
    """
    ids = body.ids()
    facts = body.facts(ids.source(schemas.PROGRAM))

    def write() -> dict[str, Any]:
        memories.layers(principal.tenant, name)
        if not facts:
            return {"results": []}
        memory = made_for_ids(memories, principal.tenant, name, ids)
        change = memory.store.add(facts, author=author_of(principal))
        return {"results": [memory.event(one) for one in events_of_write(memory.store, change)]}

    answer = await anyio.to_thread.run_sync(write)
    request.state.target = ids.memory(name)
    request.state.changed = any(one["event"] != "NONE" for one in answer["results"])
    return JSONResponse(answer)


@router.post("/v3/memories/", response_model=schemas.MemoryPage, responses=_WRITES)
async def get_all(
    name: str,
    body: schemas.MemoryFilter,
    request: Request,
    memories: MemoriesOf,
    principal: PrincipalOf,
    *,
    page: Annotated[int, Query(ge=1, le=1_000_000, description="Counted from 1.")] = 1,
    page_size: Annotated[int, Query(ge=1, le=1000, description="How many on a page.")] = 100,
) -> Response:
    """All that is remembered for exactly these ids, page by page, oldest first."""
    ids = schemas.ids_of_filters(body.filters)
    start = (page - 1) * page_size

    def look() -> dict[str, Any]:
        memory = memory_of_ids(memories, principal.tenant, name, ids)
        count, objects = (0, []) if memory is None else _page_of(memory, start, page_size)
        return {
            "count": count,
            "next": str(request.url.include_query_params(page=page + 1)) if start + page_size < count else None,
            "previous": str(request.url.include_query_params(page=page - 1)) if page > 1 else None,
            "results": objects,
        }

    return await _answered(look)


def _page_of(memory: Mem0Memory, start: int, size: int) -> tuple[int, list[dict[str, Any]]]:
    revision = memory.store.revision
    count = memory.store.count(at=revision)
    if start >= count:
        return count, []
    return count, memory.objects(list(islice(memory.store.sound_entries(at=revision), start, start + size)))


@router.post("/v3/memories/search/", response_model=schemas.FoundMemories, responses=_WRITES)
async def search(name: str, body: schemas.MemorySearch, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """What is remembered for exactly these ids and holds words of a query, or begins words with them; most of them first."""
    ids = schemas.ids_of_filters(body.filters)

    def look() -> dict[str, Any]:
        memory = memory_of_ids(memories, principal.tenant, name, ids)
        found = [] if memory is None else memory.store.search(body.query, limit=body.top_k or _TOP_K)
        objects = [] if memory is None else memory.objects(found)
        scores = [share_of_words(one.text, body.query) for one in found]
        scored = [one | {"score": score} for one, score in zip(objects, scores, strict=True)]
        return {"results": [one for one in scored if one["score"] >= (body.threshold or 0)]}

    return await _answered(look)


@router.get("/v1/memories/{memory_id}/", response_model=schemas.MemoryObject, responses=_READS)
async def get(name: str, memory_id: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """One memory."""

    def look() -> dict[str, Any]:
        memory, entry = memory_with(memories, principal.tenant, name, memory_id)
        return memory.objects([memory.store.get(entry)])[0]

    return await _answered(look)


@router.put("/v1/memories/{memory_id}/", response_model=schemas.UpdatedMemory, responses=_WRITES)
async def update(
    name: str,
    memory_id: str,
    body: schemas.MemoryUpdate,
    request: Request,
    memories: MemoriesOf,
    principal: PrincipalOf,
) -> Response:
    """Let a memory say something else. What it said before stays in its history."""

    def write() -> tuple[dict[str, Any], bool]:
        memory, entry = memory_with(memories, principal.tenant, name, memory_id)
        source = memory.store.get(entry).source
        change = memory.store.edit(entry, author=author_of(principal), text=body.text, source=source)
        now = memory.objects([memory.store.history(entry)[-1]])[0]
        return now | {"text": now["memory"]}, bool(change.superseded)

    answer, request.state.changed = await anyio.to_thread.run_sync(write)
    return JSONResponse(answer)


@router.delete("/v1/memories/{memory_id}/", response_model=schemas.Done, responses=_WRITES)
async def delete(
    name: str,
    memory_id: str,
    memories: MemoriesOf,
    principal: PrincipalOf,
    *,
    delete_linked: Annotated[  # noqa: ARG001  # what a memory said before is in its history alone
        bool, Query(description="What it said before never comes back in any case.")
    ] = False,
) -> Response:
    """End a memory: it is no longer read, but stays in its history. `DELETE /api/memories/…?purge=true` leaves no byte of it."""

    def write() -> dict[str, Any]:
        memory, entry = memory_with(memories, principal.tenant, name, memory_id)
        memory.store.remove(entry, author=author_of(principal))
        return {"message": "Memory deleted successfully!"}

    return await _answered(write)


@router.delete("/v1/memories/", response_model=schemas.Done, responses=_WRITES)
async def delete_all(
    name: str,
    whose: Annotated[schemas.Ids, Query()],
    request: Request,
    memories: MemoriesOf,
    principal: PrincipalOf,
) -> Response:
    """End all that is remembered for exactly these ids. 400 without any."""
    ids = EntityIds(**whose.model_dump())
    if not ids:
        raise UsageError(f"Whose memories are meant? Send one of {', '.join(KINDS)}. Nothing was deleted.")
    ended = await anyio.to_thread.run_sync(partial(_end_all, memories, principal, name, ids))
    request.state.target, request.state.changed = ids.memory(name), bool(ended)
    return JSONResponse({"message": "Memories deleted successfully!"})


def _end_all(memories: Memories, principal: Principal, name: str, ids: EntityIds) -> int:
    memory = memory_of_ids(memories, principal.tenant, name, ids)
    if memory is None:
        return 0
    entries = [one.id for one in memory.store.entries()]
    return memory.store.remove(*entries, author=author_of(principal)).removed if entries else 0


@router.get("/v1/memories/{memory_id}/history/", response_model=list[schemas.PastEvent], responses=_READS)
async def history(name: str, memory_id: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """What happened to a memory, oldest first; also to one that was deleted, unless it was purged."""

    def look() -> list[dict[str, Any]]:
        memory, entry = memory_with(memories, principal.tenant, name, memory_id)
        return memory.past(list(events_of_entry(memory.store, entry)))

    return await _answered(look)
