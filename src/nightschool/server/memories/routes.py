"""Explicit memories over HTTP: entries that are read, added, edited and ended, and what they were before.

What is written here is in effect for the next request that reads the memory.
"""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from nightschool.errors import UsageError
from nightschool.memory.store import MemoryStore
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.memories import schemas
from nightschool.server.memories.access import (
    After,
    At,
    Limit,
    MemoriesOf,
    author_of,
    described,
    reading,
    revision_of,
    writing,
)
from nightschool.server.openai.schema import MOST_OVERLAYS
from nightschool.server.service import PrincipalOf
from nightschool.store.names import NAME_PATTERN
from nightschool.store.principal import DEFAULT_TENANT

router = APIRouter(prefix="/api/memories", tags=["Explicit memory"], route_class=BodyRoute)


@router.get("", response_model=schemas.MemoryList, responses=problems(409))
async def every_memory(memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """The memories of the caller's tenant, and those that are shared with it."""

    def look() -> list[dict[str, Any]]:
        tenant = principal.tenant
        own = [described(name, memories.store(tenant, name)) for name in memories.names(tenant)]
        shared = [described(name, memories.store(DEFAULT_TENANT, name)) for name in memories.shared_names(tenant)]
        return [one | {"shared": False} for one in own] + [one | {"shared": True} for one in shared]

    return JSONResponse({"memories": await anyio.to_thread.run_sync(look)})


@router.post("", status_code=201, response_model=schemas.Memory, responses=problems(400, 408, 409, 413, 422))
async def create(body: schemas.NewMemory, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Make an empty memory. 409 if there is one of that name."""

    def make() -> dict[str, Any]:
        return described(body.name, memories.create(principal.tenant, body.name))

    return JSONResponse(await anyio.to_thread.run_sync(make), 201)


@router.get("/{name}", response_model=schemas.Memory, responses=problems(400, 404, 409))
async def one_memory(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """How many entries a memory has, and its newest revision."""
    return await reading(memories, principal, name, lambda store: described(name, store))


@router.get("/{name}/search", response_model=schemas.FoundEntries, responses=problems(400, 404, 409, 422))
async def search(
    name: str,
    memories: MemoriesOf,
    principal: PrincipalOf,
    *,
    q: Annotated[str, Query(min_length=1, max_length=1000, description="Words that the entries hold.")],
    limit: Limit = 20,
    overlay: Annotated[
        list[Annotated[str, Field(pattern=NAME_PATTERN)]] | None,
        Query(
            max_length=MOST_OVERLAYS,
            description="Another memory of the tenant that lies over it; more than one time, each lies over those before it.",
        ),
    ] = None,
) -> Response:
    """The entries that hold words of a query, those with most of them first, as a request that reads the memory sees them.

    Those of the last `overlay` come first, then those of the memory, then those of one that is shared under its name; what an upper one says of
    a subject and a relation hides what is beneath.
    """
    return JSONResponse(
        await anyio.to_thread.run_sync(memories.search, principal.tenant, name, q, limit, overlay or ())
    )


@router.get("/{name}/entries", response_model=schemas.Entries, responses=problems(400, 404, 409, 422))
async def entries(
    name: str, memories: MemoriesOf, principal: PrincipalOf, *, after: After = 0, limit: Limit = 100, at: At = None
) -> Response:
    """The entries of a revision, page by page, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        revision = store.revision_at(revision_of(at))
        found = list(store.entries(at=revision, after=after, limit=limit + 1))
        shown = [entry.to_json() for entry in found[:limit]]
        return {"revision": revision, "entries": shown, "next": found[limit - 1].row if len(found) > limit else None}

    return await reading(memories, principal, name, look)


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
    author = author_of(principal)
    return await writing(memories, principal, name, lambda store: store.add(new, author=author), 201)


@router.get("/{name}/entries/{entry}", response_model=schemas.Entry, responses=problems(400, 404, 409, 422))
async def one_entry(name: str, entry: str, memories: MemoriesOf, principal: PrincipalOf, *, at: At = None) -> Response:
    """One entry, as a revision has it."""
    return await reading(memories, principal, name, lambda store: store.get(entry, at=revision_of(at)).to_json())


@router.patch(
    "/{name}/entries/{entry}", response_model=schemas.Changed, responses=problems(400, 404, 408, 409, 413, 422, 507)
)
async def edit(name: str, entry: str, body: schemas.FactEdit, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Let an entry say something else. What it said before stays in its history."""
    new, author = body.changes(), author_of(principal)
    return await writing(memories, principal, name, lambda store: store.edit(entry, author=author, **new))


@router.delete(
    "/{name}/entries/{entry}",
    response_model=schemas.Changed | schemas.Purged,
    responses=problems(400, 404, 409, 422, 507),
)
async def remove(
    name: str,
    entry: str,
    memories: MemoriesOf,
    principal: PrincipalOf,
    *,
    purge: Annotated[bool, Query(description="Delete it for good, with all that it ever said.")] = False,
    of: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=100,
            description="The memory that has the entry, as answers name it (`shared:friends`), where it lies beneath this one.",
        ),
    ] = None,
) -> Response:
    """End an entry: it is no longer read, but stays in the history.

    What another memory says, `of` which the entry is, stays there as it is; it is taken back in this memory, by an entry that can
    be listed and ended, and hidden wherever this memory lies over the other one. With `purge` all its versions are gone for good, from the file and its log too; the answer names the versions of the memory that had
    shown it, and those of models that learned it, which nothing can tell afterwards. 409 while another process reads the old bytes.
    """
    author = author_of(principal)
    if of is not None and of != name:
        if purge:
            raise UsageError("An entry is purged in its own memory. Leave out `of`, or `purge`.")
        return await writing(
            memories, principal, name, lambda store: memories.retract(principal.tenant, store, of, entry, author)
        )
    if purge:
        return await reading(
            memories, principal, name, lambda store: memories.purge(principal.tenant, name, store, entry, author)
        )
    return await writing(memories, principal, name, lambda store: store.remove(entry, author=author))


@router.get("/{name}/entries/{entry}/history", response_model=schemas.History, responses=problems(400, 404, 409))
async def history(name: str, entry: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """All versions of an entry, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        return {"id": entry, "versions": [one.to_json() for one in store.history(entry)]}

    return await reading(memories, principal, name, look)
