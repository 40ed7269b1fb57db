"""Apps under test: in this process through a test client, or on a real socket in a thread."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from nightschool.server.app import create_app
from nightschool.server.run import listening, server_config
from nightschool.server.settings import ServerSettings
from tests.support.fake_slot import FakeSlot


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until a condition holds; how long is up to the machine, so the limit only ends a test that fails."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return value


@contextmanager
def client_of(slot: Any, *, keep_out: bool = False, **settings: Any) -> Iterator[TestClient]:
    """A client of an app of one slot or a list of them in this process, after the first look for versions."""
    more = {name: settings.pop(name) for name in ("registry", "conversations", "open_slot") if name in settings}
    slots = slot if isinstance(slot, list) else [slot]
    app = create_app(slots, ServerSettings(**settings), **more)
    with TestClient(app, base_url="http://127.0.0.1:8001") as client:
        fakes = [one for one in slots if isinstance(one, FakeSlot) and not keep_out]
        eventually(lambda: all(map(_was_looked_at, fakes)))
        yield client


def _was_looked_at(slot: FakeSlot) -> bool:
    return bool(slot.refreshes and (slot.current is not None or slot.promoted is None or slot.fails_with))


class LiveServer:
    def __init__(self, app: FastAPI, listener: socket.socket, settings: ServerSettings) -> None:
        self.server = uvicorn.Server(server_config(app, settings))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz").status_code == 200
        except httpx2.TimeoutException:
            return False  # on a busy machine the first answer takes longer than a client waits

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def live(slot: Any, *, wait: bool = True, **settings: Any) -> Iterator[LiveServer]:
    """A server on a free port of this machine, with a model if the slot promises one."""
    more = {name: settings.pop(name) for name in ("registry", "conversations", "open_slot") if name in settings}
    chosen = ServerSettings(port=0, **{"drain_seconds": 5, **settings})
    with listening(chosen) as listener:
        slots = slot if isinstance(slot, list) else [slot]
        server = LiveServer(create_app(slots, chosen, **more), listener, chosen)
        server.thread.start()
        eventually(lambda: server.server.started)
        if (
            wait
            and getattr(slot, "promoted", True) is not None
            and (not isinstance(slot, FakeSlot) or slot.may_load.is_set())
        ):
            eventually(server.is_ready)
        try:
            yield server
        finally:
            server.stop()


class LogLines(logging.Handler):
    """Keeps log records of the server for a test to read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        from nightschool.server.logs import JsonLines

        self.rows.append(json.loads(JsonLines().format(record)))


@contextmanager
def server_log() -> Iterator[LogLines]:
    lines, logger = LogLines(), logging.getLogger("nightschool")
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel("DEBUG")
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)
