"""The revisions of a memory over HTTP: committed writes, names for them, what differs, and the ways back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

from nightschool.memory.entry import Change
from nightschool.memory.store import MemoryStore
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.memories import schemas
from nightschool.server.memories.access import (
    MOST_ON_A_PAGE,
    After,
    At,
    Limit,
    MemoriesOf,
    author_of,
    reading,
    revision_of,
    writing,
)
from nightschool.server.service import PrincipalOf

router = APIRouter(prefix="/api/memories/{name}", tags=["Explicit memory"], route_class=BodyRoute)
_WRITES = problems(400, 404, 408, 409, 413, 422, 507)


@router.get("/revisions", response_model=schemas.Writes, responses=problems(400, 404, 409, 422))
async def revisions(
    name: str, memories: MemoriesOf, principal: PrincipalOf, *, after: After = 0, limit: Limit = 100
) -> Response:
    """The committed writes after a revision, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        return {"revisions": [one.to_json() for one in store.revisions(after=after, limit=limit)]}

    return await reading(memories, principal, name, look)


@router.post("/undo", response_model=schemas.Undone, responses=_WRITES)
async def undo(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Take back the newest write that was not taken back yet, and say which it was. 409 if there is none, or it was a purge."""

    def undone(store: MemoryStore, change: Change) -> dict[str, Any]:
        return {"undone": store.undone_by(change.revision)}

    author = author_of(principal)
    return await writing(memories, principal, name, lambda store: store.undo(author=author), more=undone)


@router.post("/rollback", response_model=schemas.Changed, responses=_WRITES)
async def rollback(name: str, body: schemas.Rollback, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Bring back the state of a revision, or of a named one, as a new revision. What was purged does not return."""
    to, author = revision_of(body.to), author_of(principal)
    assert to is not None
    return await writing(memories, principal, name, lambda store: store.rollback(to, author=author))


@router.get("/versions", response_model=schemas.NamedRevisions, responses=problems(400, 404, 409))
async def versions(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """The revisions that have a name, oldest first."""

    def look(store: MemoryStore) -> dict[str, Any]:
        return {"versions": [one.to_json() for one in store.versions()]}

    return await reading(memories, principal, name, look)


@router.post("/versions", status_code=201, response_model=schemas.NamedRevision, responses=_WRITES)
async def name_version(
    name: str, body: schemas.NewNamedRevision, memories: MemoriesOf, principal: PrincipalOf
) -> Response:
    """Give a revision a name; without one the newest. 409 if the name is taken."""

    def write(store: MemoryStore) -> dict[str, Any]:
        return store.name_version(body.name, author=author_of(principal), at=revision_of(body.at)).to_json()

    return await reading(memories, principal, name, write, 201)


@router.delete("/versions/{version}", status_code=204, responses=problems(400, 404, 409, 507))
async def remove_version(name: str, version: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Forget a name; the revision stays."""

    def write(store: MemoryStore) -> dict[str, Any]:
        store.remove_version(version)
        return {}

    await reading(memories, principal, name, write)
    return Response(status_code=204)


@router.get("/diff", response_model=schemas.Differences, responses=problems(400, 404, 409, 422))
async def diff(
    name: str,
    memories: MemoriesOf,
    principal: PrincipalOf,
    *,
    before: Annotated[str, Query(min_length=1, max_length=64, description="A revision, or its name.")],
    after: At = None,
    limit: Limit = MOST_ON_A_PAGE,
) -> Response:
    """The entries that two revisions have differently."""
    older = revision_of(before)
    assert older is not None

    def look(store: MemoryStore) -> dict[str, Any]:
        found = store.diff(older, revision_of(after))
        return {"total": len(found), "entries": [one.to_json() for one in found[:limit]]}

    return await reading(memories, principal, name, look)
