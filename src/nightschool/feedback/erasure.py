"""Deleting a conversation: where it went, what learned it, and what is marked for it.

A conversation is copied into the folders of the runs that selected it, and learned by the versions that they made; every
version that grew from one of these may know it, too. Deleting takes the copies away and marks the versions as tainted;
only training anew takes it out of weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nightschool.data.example import Example
from nightschool.errors import Conflict, Damaged
from nightschool.events import now
from nightschool.feedback.conversations import Conversation, ConversationStore
from nightschool.feedback.replay_pool import origin_of
from nightschool.feedback.selection import HELD_OUT, NEW, REPLAYED
from nightschool.store.atomic import write_bytes
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.names import full_name, split_name
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore
from nightschool.store.tables import accepted_examples, is_name_in, key_of, tainted_versions

_LEARNED = (NEW, REPLAYED)
_COPIES = (*_LEARNED, HELD_OUT)


@dataclass(frozen=True)
class Traces:
    """Where a conversation went: runs whose data hold it, and versions that learned it or grew from one that did."""

    request_id: str
    tenant: str
    runs: tuple[str, ...]
    versions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"request_id": self.request_id, "runs": list(self.runs), "versions": list(self.versions)}


def traces_of(home: Home, conversation: Conversation) -> Traces:
    """Where a conversation went, of its tenant's runs and versions. Reads the data of every run: seconds, where there are many."""
    tenant, request_id = split_name(conversation.model)[0], conversation.request_id
    runs = [run for run in RunStore(home).ls(tenant) if any(_holds(run.path / file, request_id) for file in _COPIES)]
    learned_in = {run.id for run in runs if any(_holds(run.path / file, request_id) for file in _LEARNED)}
    with home.database.read() as connection:
        query = sa.select(accepted_examples).where(accepted_examples.c.origin == request_id)
        accepted = {f"{full_name(row.tenant, row.name)}@{row.version}" for row in connection.execute(query)}
    versions = _grown_from(Registry(home), tenant, learned_in, accepted)
    return Traces(request_id, tenant, tuple(run.id for run in runs), tuple(versions))


def erase(home: Home, request_id: str, *, owner: str | None = None, tenant: str | None = None) -> tuple[Traces, int]:
    """Delete a conversation, its feedback, and its copies in the data of runs, and mark what may know it.

    A run whose data were cut cannot be resumed or proven any more. Where it is cut off, it can be done again.

    Args:
        home: Where it is.
        request_id: Of the answer.
        owner: Who asks, if not everybody may; see `ConversationStore.feedback`.
        tenant: Whose it must be, if not anybody's.

    Returns:
        Where it was, and how many accepted examples were deleted with it.

    Raises:
        NotFound: If there is no such conversation, or it is another's.
        Conflict: If a run that holds it is at work.
    """
    store = ConversationStore(home.database)
    found = traces_of(home, store.get(request_id, owner=owner, tenant=tenant))
    runs = [RunStore(home).get(run_id) for run_id in found.runs]
    for run in runs:
        _refuse_living(run, request_id)
    _taint(home.database, found)
    for run in runs:
        for file in _COPIES:
            _cut(run.path / file, request_id)
    return found, store.forget(request_id, owner=owner)


def taints_of(database: Database, name: str) -> dict[str, list[str]]:
    """The deleted conversations that versions of a name may know, by the version's id."""
    query = (
        sa.select(tainted_versions).where(*is_name_in(tainted_versions, name)).order_by(tainted_versions.c.tainted_at)
    )
    found: dict[str, list[str]] = {}
    with database.read() as connection:
        for row in connection.execute(query):
            found.setdefault(row.version, []).append(row.request_id)
    return found


def _grown_from(registry: Registry, tenant: str, runs: set[str], learned: set[str]) -> list[str]:
    """The versions of a tenant that these runs made, that learned, or that grew from or stand on one of them."""
    versions = [version for name in registry.names(tenant) for version in registry.versions(name)]
    knows = {version.ref for version in versions if version.ref in learned or _fact(version, "run_id") in runs}
    while True:
        more = {v.ref for v in versions if {_fact(v, "parent"), _fact(v, "base")} & knows} - knows
        if not more:
            return sorted(knows)
        knows |= more


def _fact(version: Version, field: str) -> str | None:
    try:
        value = getattr(version.facts, field)
    except Damaged:
        return None
    return str(value) if value is not None else None


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of examples with what they say; none where there is no such file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                yield line, json.loads(line)


def _is_of(row: dict[str, Any], request_id: str) -> bool:
    return origin_of(Example.from_json(row)) == request_id


def _holds(path: Path, request_id: str) -> bool:
    needle = json.dumps(request_id).encode()
    return any(needle in line and _is_of(row, request_id) for line, row in _rows(path))


def _cut(path: Path, request_id: str) -> None:
    if _holds(path, request_id):
        write_bytes(path, b"".join(line for line, row in _rows(path) if not _is_of(row, request_id)))


def _refuse_living(run: Run, request_id: str) -> None:
    if run.status.process_lives:
        raise Conflict(
            f"The run {run.id} is learning {request_id} now. Stop it with nightschool runs stop {run.id}, or wait."
        )


def _taint(database: Database, found: Traces) -> None:
    moment = now()
    with database.write() as connection:
        for ref in found.versions:
            name, _, version = ref.partition("@")
            row = {**key_of(name), "version": version, "request_id": found.request_id}
            there = sa.and_(*(tainted_versions.c[column] == value for column, value in row.items()))
            if connection.execute(sa.select(tainted_versions.c.version).where(there)).first() is None:
                connection.execute(tainted_versions.insert().values(**row, tainted_at=moment))
