"""What every route needs, in one frozen value."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request

from nightschool.engine.slot import Slot
from nightschool.errors import Damaged
from nightschool.server.access_store import AccessStore
from nightschool.server.errors import Refusal
from nightschool.server.metrics import Metrics
from nightschool.server.recording import Recorder
from nightschool.server.refresher import Refresher
from nightschool.server.served_names import ServedNames
from nightschool.server.settings import ServerSettings
from nightschool.server.submission import Answering
from nightschool.store.home import Home
from nightschool.store.names import split_name
from nightschool.store.principal import DEFAULT_TENANT, Principal
from nightschool.store.registry import Registry
from nightschool.store.versions import Version


@dataclass(frozen=True)
class Service:
    """The parts of one running server."""

    names: ServedNames
    settings: ServerSettings
    registry: Registry | None
    metrics: Metrics
    refresher: Refresher
    recorder: Recorder
    answering: Answering
    access: AccessStore
    device: str


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


def _principal(request: Request) -> Principal:
    """Who asks, as its key says; without keys it is this machine."""
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal


def owner_of(request: Request) -> str | None:
    """Whose an exchange is: the key's that asked; everybody's without keys."""
    return _principal(request).key


def home_of_service(service: Service) -> Home:
    """Where this server's files and jobs are. Raises Refusal if it serves without a home."""
    if service.registry is None:
        raise Refusal(409, "This server has no registry. Start it on a home directory.", "no_registry")
    return service.registry.home


PrincipalOf = Annotated[Principal, Depends(_principal)]
OwnerOf = Annotated[str | None, Depends(owner_of)]
ServiceOf = Annotated[Service, Depends(_service)]
RequestId = Annotated[str, Depends(_request_id)]


def timestamp(moment: datetime | None = None) -> str:
    """ISO 8601 in UTC, always with microseconds; without a moment, now."""
    return (moment or datetime.now(UTC)).isoformat(timespec="microseconds")


def published_at(version: Version) -> datetime:
    """When a version was published; of a damaged one, which must not hide the others, when its folder was made."""
    with contextlib.suppress(Damaged):
        if version.facts.created_at is not None:
            return version.facts.created_at
    return datetime.fromtimestamp(version.path.stat().st_mtime, UTC)


def is_public(service: Service, slot: Slot) -> bool:
    """Whether people without a key may hear what a name is called: all of them without keys, else the default tenant's."""
    return not service.access.keyring.was_needed or split_name(slot.name)[0] == DEFAULT_TENANT


def shown_path(version: Version) -> str:
    """Where a version lies in the home; where the home lies on this machine is nobody's business over HTTP."""
    return "/".join(version.path.parts[-3:])
