"""Explicit memories over HTTP: entries that are read, added, edited and ended, and what they were before.

What is written here is in effect for the next request that reads the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from nightschool.memory.entry import Change
from nightschool.memory.store import MemoryStore
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.errors import Refusal
from nightschool.server.memories import schemas
from nightschool.server.memories.opened import Memories
from nightschool.server.service import PrincipalOf
from nightschool.store.principal import Principal

router = APIRouter(prefix="/api/memories", tags=["Explicit memory"], route_class=BodyRoute)
Result = TypeVar("Result")
_MOST_ON_A_PAGE = 1000

After = Annotated[int, Query(ge=0, description="The `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=_MOST_ON_A_PAGE, description="How many at most.")]
At = Annotated[int | None, Query(ge=0, description="The revision to be read; without it the newest.")]


def _memories(request: Request) -> Memories:
    memories = request.app.state.memories
    if memories is None:
        raise Refusal(409, "This server has no home, so it has no memories. Start it on a home directory.", "no_home")
    assert isinstance(memories, Memories)
    return memories


MemoriesOf = Annotated[Memories, Depends(_memories)]


@router.get("", response_model=schemas.MemoryList, responses=problems(409))
async def every_memory(memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """The memories of the caller's tenant."""

    def look() -> list[dict[str, Any]]:
        tenant = principal.tenant
        return [_described(name, memories.store(tenant, name)) for name in memories.names(tenant)]

    return JSONResponse({"memories": await anyio.to_thread.run_sync(look)})


@router.post("", status_code=201, response_model=schemas.Memory, responses=problems(400, 408, 409, 413, 422))
async def create(body: schemas.NewMemory, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Make an empty memory. 409 if there is one of that name."""

    def make() -> dict[str, Any]:
        return _described(body.name, memories.create(principal.tenant, body.name))

    return JSONResponse(await anyio.to_thread.run_sync(make), 201)


@router.get("/{name}", response_model=schemas.Memory, responses=problems(400, 404, 409))
async def one_memory(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """How many entries a memory has, and its newest revision."""
    return await _read(memories, principal, name, lambda store: _described(name, store))


@router.get("/{name}/entries", response_model=schemas.Entries, responses=problems(400, 404, 409, 422))
async def entries(
    name: str, memories: MemoriesOf, principal: PrincipalOf, *, after: After = 0, limit: Limit = 100, at: At = None
) -> Response:
    """The entries of a revision, page by page, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        revision = store.revision if at is None else at
        found = list(store.entries(at=revision, after=after, limit=limit + 1))
        shown = [entry.to_json() for entry in found[:limit]]
        return {"revision": revision, "entries": shown, "next": found[limit - 1].row if len(found) > limit else None}

    return await _read(memories, principal, name, look)


@router.post(
    "/{name}/entries",
    status_code=201,
    response_model=schemas.Changed,
    responses=problems(400, 404, 408, 409, 413, 422, 507),
)
async def add(name: str, body: schemas.Facts, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Remember facts, all or none, as one revision.

    A fact of the same subject and relation supersedes the one that was there, unless the relation takes several values.
    What says the same as an entry that is there changes nothing.
    """
    new = [fact.as_entry() for fact in body.entries]
    author = _author(principal)
    return await _write(memories, principal, name, lambda store: store.add(new, author=author), 201)


@router.get("/{name}/entries/{entry}", response_model=schemas.Entry, responses=problems(400, 404, 409, 422))
async def one_entry(name: str, entry: str, memories: MemoriesOf, principal: PrincipalOf, *, at: At = None) -> Response:
    """One entry, as a revision has it."""
    return await _read(memories, principal, name, lambda store: store.get(entry, at=at).to_json())


@router.patch(
    "/{name}/entries/{entry}", response_model=schemas.Changed, responses=problems(400, 404, 408, 409, 413, 422, 507)
)
async def edit(name: str, entry: str, body: schemas.FactEdit, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Let an entry say something else. What it said before stays in its history."""
    new, author = body.changes(), _author(principal)
    return await _write(memories, principal, name, lambda store: store.edit(entry, author=author, **new))


@router.delete("/{name}/entries/{entry}", response_model=schemas.Changed, responses=problems(400, 404, 409, 507))
async def remove(name: str, entry: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """End an entry: it is no longer read, but stays in the history."""
    author = _author(principal)
    return await _write(memories, principal, name, lambda store: store.remove(entry, author=author))


@router.get("/{name}/entries/{entry}/history", response_model=schemas.History, responses=problems(400, 404, 409))
async def history(name: str, entry: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """All versions of an entry, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        return {"id": entry, "versions": [one.to_json() for one in store.history(entry)]}

    return await _read(memories, principal, name, look)


@router.get("/{name}/revisions", response_model=schemas.Writes, responses=problems(400, 404, 409, 422))
async def revisions(
    name: str, memories: MemoriesOf, principal: PrincipalOf, *, after: After = 0, limit: Limit = 100
) -> Response:
    """The committed writes after a revision, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        return {"revisions": [one.to_json() for one in store.revisions(after=after, limit=limit)]}

    return await _read(memories, principal, name, look)


def _author(principal: Principal) -> str:
    """Who is written down as the author: the key by its public id, as it is in the audit log."""
    return f"key:{principal.key_id}" if principal.key_id is not None else "http"


def _described(name: str, store: MemoryStore) -> dict[str, Any]:
    revision = store.revision
    return {"name": name, "revision": revision, "entries": store.count(at=revision)}


async def _read(
    memories: Memories, principal: Principal, name: str, look: Callable[[MemoryStore], dict[str, Any]]
) -> Response:
    def run() -> dict[str, Any]:
        return look(memories.store(principal.tenant, name))

    return JSONResponse(await anyio.to_thread.run_sync(run))


async def _write(
    memories: Memories, principal: Principal, name: str, write: Callable[[MemoryStore], Change], status: int = 200
) -> Response:
    def run() -> dict[str, Any]:
        change = write(memories.store(principal.tenant, name))
        return change.to_json() | {"ids": change.ids}

    return JSONResponse(await anyio.to_thread.run_sync(run), status)
