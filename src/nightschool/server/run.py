"""The serving process: its port, its log, its slot, and how it stops."""

from __future__ import annotations

import errno
import gc
import logging
import math
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.server.app import create_app
from nightschool.server.bases_ahead import BasesAhead
from nightschool.server.connections import Connections
from nightschool.server.logs import configure_logs
from nightschool.server.served_names import DEFAULT_NAME
from nightschool.server.settings import ServerSettings
from nightschool.store.api_keys import ApiKeys
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.store.registry import Registry

log = logging.getLogger("nightschool.server")
_BACKLOG = 1024


def serve(
    home: Home, names: Sequence[str], settings: ServerSettings, *, engine: Mapping[str, Any] | None = None
) -> None:
    """Serve names until SIGTERM or SIGINT; running answers may finish within `drain_seconds`.

    Args:
        home: Where versions and conversations are.
        names: The served names; the first answers who names no model. No version of them needs to exist yet. Without
            any, whatever the home has is served when somebody asks for it.
        settings: Address, keys, bounds.
        engine: Settings of `EnginePool` and its engines, such as `device` and `num_rows`.

    Raises:
        UsageError: If the address is open to others without a key, or cannot be listened on.
        Conflict: If the port is in use.
    """
    settings.check(stored_keys=ApiKeys(home.database).any())
    configure_logs(settings.log_level)
    with listening(settings) as listener:
        conversations = ConversationStore(home.database.connect()) if settings.record_conversations else None
        chosen = dict(engine or {})
        device = torch.device(chosen.get("device", "cpu")).type
        pool = EnginePool(
            home, host_bytes=settings.max_host_bytes, experts_resident=settings.experts_resident, **chosen
        )

        def open_slot(key: str) -> Slot:
            name, _, version = key.partition("@")
            return Slot(name, pool, version or None)

        app = create_app(
            [open_slot(name) for name in names or (DEFAULT_NAME,)],
            settings,
            registry=Registry(home),
            open_slot=None if names else open_slot,
            conversations=conversations,
            device=device,
            bases_ahead=None if names else BasesAhead(pool, JobQueue(home.database)),
        )
        run_app(app, settings, listener)


def run_app(app: FastAPI, settings: ServerSettings, listener: socket.socket) -> None:
    """Run an app on a socket until a signal; one process, one event loop."""
    config = server_config(app, settings)
    # What the libraries made while they were imported is never garbage, and looking through it again and again holds up
    # every thread (measured: half a million lists in a body took 650 ms to parse, and 80 ms so).
    gc.collect()
    gc.freeze()
    address = listener.getsockname()
    log.info("listening", extra={"facts": {"url": f"http://{address[0]}:{address[1]}"}})
    with _signals_end_quietly():
        uvicorn.Server(config).run(sockets=[listener])


def server_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn serves an app of ours."""
    connections = Connections(
        settings.max_connections,
        settings.max_connections_per_address,
        settings.idle_timeout_seconds,
        settings.write_timeout_seconds,
    )
    return uvicorn.Config(
        app,
        http=connections.protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        timeout_keep_alive=math.ceil(settings.idle_timeout_seconds),
    )


@contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket on the address of the settings, taken before any model is loaded.

    Raises:
        Conflict: If another process listens there.
        UsageError: If the address is not one of this machine, or the port is reserved.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(
            f"The host {host!r} is not an address ({error.strerror}). Choose another with --host."
        ) from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"Port {port} of {host} is in use by another process (Address already in use). "
                    f"Choose another with --port, or stop that process."
                ) from None
            raise UsageError(
                f"Port {port} of {host} cannot be listened on: {error.strerror}. Choose others with --host and --port."
            ) from None
        yield listener


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Uvicorn raises the signal that stopped it once more when all is closed; that one is no news."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
