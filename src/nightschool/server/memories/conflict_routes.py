"""What a memory's entries say against each other, over HTTP; how many values a relation has; whether the file is whole."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from nightschool.memory.checking import check_memory
from nightschool.memory.store import MemoryStore
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import problems
from nightschool.server.memories import schemas
from nightschool.server.memories.access import MOST_ON_A_PAGE, Limit, MemoriesOf, author_of, reading, writing
from nightschool.server.service import PrincipalOf

router = APIRouter(prefix="/api/memories/{name}", tags=["Explicit memory"], route_class=BodyRoute)
_WRITES = problems(400, 404, 408, 409, 413, 422, 507)


@router.get("/conflicts", response_model=schemas.Conflicts, responses=problems(400, 404, 409, 422))
async def conflicts(
    name: str, memories: MemoriesOf, principal: PrincipalOf, *, limit: Limit = MOST_ON_A_PAGE
) -> Response:
    """Pairs of entries of which perhaps only one holds, and which nobody has settled."""

    def look(store: MemoryStore) -> dict[str, Any]:
        found = store.conflicts()
        return {"total": len(found), "conflicts": [one.to_json() for one in found[:limit]]}

    return await reading(memories, principal, name, look)


@router.post("/conflicts/resolve", response_model=schemas.Changed, responses=_WRITES)
async def resolve(name: str, body: schemas.Resolution, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Settle two entries: keep one, keep both, or merge them into the first."""
    author = author_of(principal)
    return await writing(
        memories, principal, name, lambda store: store.resolve(body.a, body.b, body.keep, author=author, text=body.text)
    )


@router.get("/relations", response_model=schemas.Cardinalities, responses=problems(400, 404, 409))
async def relations(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """The relations whose number of values was set here."""
    return await reading(memories, principal, name, lambda store: {"relations": store.relations()})


@router.post("/relations", response_model=schemas.Cardinalities, responses=_WRITES)
async def set_relation(
    name: str, body: schemas.RelationSetting, memories: MemoriesOf, principal: PrincipalOf
) -> Response:
    """Let a relation have one value at a time, or several, from now on; null forgets what was set."""

    def write(store: MemoryStore) -> dict[str, Any]:
        store.set_relation(body.relation, body.cardinality)
        return {"relations": store.relations()}

    return await reading(memories, principal, name, write)


@router.post("/check", response_model=schemas.CheckReport, responses=_WRITES)
async def check(name: str, memories: MemoriesOf, principal: PrincipalOf) -> Response:
    """Compare everything that is kept with its digests, and indexes with their checksums; it takes time by all that is kept."""
    return await reading(memories, principal, name, lambda store: check_memory(store).to_json())
