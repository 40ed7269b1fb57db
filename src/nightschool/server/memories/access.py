"""How a route comes to a memory of the caller's tenant, and reads or writes it off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from nightschool.memory.entry import Change
from nightschool.memory.staleness import StaleVersions
from nightschool.memory.store import MemoryStore
from nightschool.server.errors import Refusal
from nightschool.server.memories.opened import Memories
from nightschool.store.principal import Principal

MOST_ON_A_PAGE = 1000

After = Annotated[int, Query(ge=0, description="The `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE, description="How many at most.")]
At = Annotated[
    str | None,
    Query(min_length=1, max_length=64, description="The revision to be read, or its name; without it the newest."),
]


def _memories(request: Request) -> Memories:
    memories = request.app.state.memories
    if memories is None:
        raise Refusal(409, "This server has no home, so it has no memories. Start it on a home directory.", "no_home")
    assert isinstance(memories, Memories)
    return memories


MemoriesOf = Annotated[Memories, Depends(_memories)]


def _stale_versions(request: Request) -> StaleVersions | None:
    memories = request.app.state.memories
    assert memories is None or isinstance(memories, Memories)
    return None if memories is None else memories.stale_versions


StaleVersionsOf = Annotated[StaleVersions | None, Depends(_stale_versions)]


def revision_of(at: str | None) -> int | str | None:
    """A revision as a store takes it: by its number, or by its name."""
    return int(at) if at is not None and at.isascii() and at.isdecimal() else at


def author_of(principal: Principal) -> str:
    """Who is written down as the author: the key by its public id, as it is in the audit log."""
    return f"key:{principal.key_id}" if principal.key_id is not None else "http"


def described(name: str, store: MemoryStore) -> dict[str, Any]:
    """A memory in a line."""
    revision = store.revision
    return {"name": name, "revision": revision, "entries": store.count(at=revision)}


async def reading(
    memories: Memories,
    principal: Principal,
    name: str,
    look: Callable[[MemoryStore], dict[str, Any]],
    status: int = 200,
) -> Response:
    """What `look` finds in a memory, or does to it."""

    def run() -> dict[str, Any]:
        return look(memories.store(principal.tenant, name))

    return JSONResponse(await anyio.to_thread.run_sync(run), status)


async def writing(
    memories: Memories,
    principal: Principal,
    name: str,
    write: Callable[[MemoryStore], Change],
    status: int = 200,
    more: Callable[[MemoryStore, Change], dict[str, Any]] = lambda _store, _change: {},
) -> Response:
    """What a write did to a memory, which versions learned what it ended, and what else there is to say of it."""

    def shown(store: MemoryStore) -> dict[str, Any]:
        change = write(store)
        stale = memories.made_stale(principal.tenant, name, store, change)
        told = {"ids": change.ids, "stale": [one.to_json() for one in stale]}
        return change.to_json() | told | more(store, change)

    return await reading(memories, principal, name, shown, status)
