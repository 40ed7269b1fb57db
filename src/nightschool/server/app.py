"""One app, its families of routes, and the order in which a request passes through the rooms before them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

import anyio.to_thread
import torch
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.routing import Route

from nightschool import __version__
from nightschool.engine.recall import MemoryChoice
from nightschool.engine.slot import Slot
from nightschool.errors import UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.server import reference_page
from nightschool.server.access_store import AccessStore
from nightschool.server.bases_ahead import BasesAhead
from nightschool.server.error_schemas import Problem
from nightschool.server.errors import install_handlers
from nightschool.server.memories import conflict_routes, mcp_routes, mem0_routes, version_routes
from nightschool.server.memories import routes as memories
from nightschool.server.memories.opened import Memories
from nightschool.server.metrics import Metrics
from nightschool.server.middleware import auth
from nightschool.server.middleware.audit import Audit
from nightschool.server.middleware.auth import Guard
from nightschool.server.middleware.limits import BodyLimit, Bounds
from nightschool.server.middleware.quotas import Quotas
from nightschool.server.middleware.request_log import Access
from nightschool.server.middleware.route_rules import RouteTable
from nightschool.server.on_demand import OnDemand
from nightschool.server.openai import checkpoint_permissions, completions, files, fine_tuning, webhook_endpoints
from nightschool.server.openai.schema import ChatRequest, CompletionRequest
from nightschool.server.recording import Recorder
from nightschool.server.refresher import Refresher
from nightschool.server.routes import feedback, operations, parametric_memory, versions
from nightschool.server.served_names import ServedNames
from nightschool.server.service import Service
from nightschool.server.settings import ServerSettings
from nightschool.server.submission import Answering
from nightschool.server.training_service import routes as training_service
from nightschool.server.training_service.parts import TrainingService
from nightschool.server.training_service.schemas import MessageRequest
from nightschool.store.registry import Registry
from nightschool.webhooks.deliverer import Deliverer

log = logging.getLogger("nightschool.server")

FAMILIES = (
    parametric_memory.router,
    completions.router,
    files.router,
    webhook_endpoints.router,
    fine_tuning.router,
    checkpoint_permissions.router,
    feedback.router,
    versions.router,
    memories.router,
    version_routes.router,
    conflict_routes.router,
    mcp_routes.router,
    mem0_routes.router,
    *training_service.ROUTERS,
    operations.router,
    reference_page.router,
)


def create_app(
    slots: Sequence[Slot],
    settings: ServerSettings,
    *,
    registry: Registry | None = None,
    open_slot: Callable[[str], Slot] | None = None,
    conversations: ConversationStore | None = None,
    device: str | None = None,
    bases_ahead: BasesAhead | None = None,
) -> FastAPI:
    """The server of one name or several.

    Args:
        slots: What answers for each name. They may be empty; the app looks for promoted versions when it starts.
        settings: Bounds and keys.
        open_slot: Makes an empty slot of a name, or of `name@version`, of the registry, when somebody asks for it; without
            it nothing but `slots` is served.
        registry: Lists and moves versions; without it `/model_info` lists none, and `/api/models` says so.
        conversations: Where conversations are kept; needed if, and used only if, the settings ask for it.
        device: `cuda` or `cpu`, where the slots put their models; without it, what this machine has.
        bases_ahead: Loads the bases of jobs while they train.

    Raises:
        UsageError: If the settings ask for recording and there is nowhere to record.
    """
    if settings.record_conversations and conversations is None:
        raise UsageError("record_conversations is on, but there is no store of conversations. Serve from a home.")
    access = AccessStore(settings, None if registry is None else registry.home.database)
    on_demand = (
        OnDemand(open_slot, settings.max_loaded_names, settings.max_loaded_bytes) if open_slot is not None else None
    )
    names = ServedNames(slots, on_demand, registry)
    metrics = Metrics(names)
    opened = None if registry is None else Memories(registry.home, settings.shared_memories)
    default = None if settings.memory is None else MemoryChoice(settings.memory, settings.memory_read)
    service = Service(
        names=names,
        settings=settings,
        registry=registry,
        metrics=metrics,
        refresher=Refresher(names, metrics, settings.model_check_interval),
        recorder=Recorder(conversations if settings.record_conversations else None, metrics),
        answering=Answering(names, metrics, opened, default),
        access=access,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    app = FastAPI(
        title="nightschool",
        version=__version__,
        description="A language model that learns by night, and answers with its newest version by day.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.state.bases_ahead = bases_ahead
    app.state.training = None if registry is None else TrainingService.of(registry, settings.training_service)
    app.state.memories = opened
    app.state.mcp_threads = mcp_routes.threads()
    for router in FAMILIES:
        app.include_router(router)
    install_handlers(app)
    # The last one added is the first one passed.
    app.add_middleware(
        BodyLimit,
        bounds=Bounds(settings.max_body_bytes, settings.body_timeout_seconds),
        of_paths=dict.fromkeys(
            training_service.BRING_CONVERSATIONS,
            Bounds(settings.max_training_body_bytes, settings.body_timeout_seconds),
        ),
        streamed={files.UPLOAD_PATH: Bounds(settings.max_file_bytes, settings.file_timeout_seconds)},
    )
    app.add_middleware(Audit, access=access)
    app.add_middleware(Quotas, settings=settings, access=access)
    app.add_middleware(Guard, settings=settings, keyring=access.keyring)
    documented = cache(partial(_documented, app, settings))
    app.openapi = lambda: documented(needs_key=access.keyring.was_needed)  # type: ignore[method-assign]  # the documented way
    app.add_middleware(Access, metrics=metrics, routes=RouteTable(routes_of(app)))
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service = app.state.service
    assert isinstance(service, Service)
    recording = "conversations are kept for later nights" if service.recorder.on else "conversations are not kept"
    facts = {
        "names": [slot.name for slot in service.names.needed] or "whatever the home has, on demand",
        "recording": recording,
        "access": list(await auth.describe(service.settings, service.access.keyring)),
    }
    log.info("serving", extra={"facts": facts})
    if service.settings.memory is not None:
        await anyio.to_thread.run_sync(_warn_of_absent_memory, service.settings.memory, app.state.memories)
    service.refresher.start()
    bases_ahead = app.state.bases_ahead
    if bases_ahead is not None:
        bases_ahead.start()
    deliverer = Deliverer(service.registry.home.database).start() if service.registry is not None else None
    yield
    log.info("stopping")
    if deliverer is not None:
        await anyio.to_thread.run_sync(deliverer.stop)
    if bases_ahead is not None:
        await anyio.to_thread.run_sync(bases_ahead.stop)
    await service.refresher.stop()
    await service.recorder.close()
    await service.access.close()
    await service.names.close()
    if app.state.memories is not None:
        await anyio.to_thread.run_sync(app.state.memories.close)
    log.info("stopped")


def _warn_of_absent_memory(name: str, memories: Memories | None) -> None:
    """Say that requests are answered without the memory that they are to read, because nobody has it."""
    if memories is None or not memories.owners(name):
        made_by = f"nightschool memory build {name} --from FILE, or POST /api/memories; it counts from then on"
        facts = {"memory": name, "until then": "requests are answered without it", "make it": made_by}
        log.warning("there is no memory of the name that requests are to read", extra={"facts": facts})


def routes_of(app: FastAPI) -> list[Route]:
    """Every route of the app, in the order in which it looks for one."""
    own = [route for route in app.routes if isinstance(route, Route)]
    return own + [route for router in FAMILIES for route in router.routes if isinstance(route, Route)]


def _documented(app: FastAPI, settings: ServerSettings, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document with the bounds of these settings, and with our errors in place of FastAPI's."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, openapi_version="3.1.0"
    )
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = Problem.model_json_schema()
    for path in document["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for body, field in _LENGTH_FIELDS:
        _set_maximum(schemas[body.__name__]["properties"][field], settings.max_new_tokens_limit)
    if needs_key:
        _document_keys(document)
    return document


def _document_keys(document: dict[str, Any]) -> None:
    """Say where the key goes, and which paths need none."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"header": []}]
    for path in auth.OPEN_PATHS:
        for operation in document["paths"][path].values():
            operation["security"] = []


_LENGTH_FIELDS: tuple[tuple[type[BaseModel], str], ...] = (
    (parametric_memory.GenerateRequest, "max_new_tokens"),
    (MessageRequest, "max_tokens"),
    (ChatRequest, "max_tokens"),
    (ChatRequest, "max_completion_tokens"),
    (CompletionRequest, "max_tokens"),
)


def _set_maximum(schema: dict[str, Any], maximum: int) -> None:
    for option in schema.get("anyOf", [schema]):
        if option.get("type") == "integer":
            option["maximum"] = maximum
