"""Streamable HTTP without sessions: each message is a request of its own, and its answer is one JSON object."""

from __future__ import annotations

import threading
from typing import Any

import anyio
from mcp.server.mcpserver import Context
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import Message, Scope

from nightschool.memory.mcp.served import HttpAnswer, Served
from nightschool.memory.mcp.tools import server_with

_STATE = "served_memory"


class HttpServer:
    """Answers for any memory, for several threads at a time. Who may ask, and from which page, is decided before it."""

    def __init__(self) -> None:
        self._sdk = server_with(_served_in)
        self._lock = threading.Lock()

    def answer(self, served: Served, scope: Scope, body: bytes) -> HttpAnswer:
        """Answer one message about a memory.

        It blocks, and has an event loop of its own, so that what the SDK parses and validates keeps nobody else waiting.
        """
        # The body is not the one that came, byte for byte, so that its length is not what the header says.
        headers = [header for header in scope["headers"] if header[0] != b"content-length"]
        message = {**scope, "headers": headers, "state": {_STATE: served}}
        return anyio.run(_answer, self._manager(len(body)), message, body)

    def _manager(self, size_bytes: int) -> StreamableHTTPSessionManager:
        # The SDK makes a manager with each app, and each can be run once.
        with self._lock:
            self._sdk.streamable_http_app(
                json_response=True,
                stateless_http=True,
                max_request_body_size=max(1, size_bytes),
                transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
            )
            return self._sdk.session_manager


def _served_in(ctx: Context[Any, Any]) -> Served:
    request = ctx.request_context.request
    assert request is not None, "it came over HTTP"
    served = request.scope["state"][_STATE]
    assert isinstance(served, Served)
    return served


async def _answer(manager: StreamableHTTPSessionManager, scope: Scope, body: bytes) -> HttpAnswer:
    coming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if coming:
            return coming.pop()
        await anyio.sleep_forever()
        raise AssertionError("it sleeps until it is cancelled")

    async def send(message: Message) -> None:
        sent.append(message)

    async with manager.run():
        await manager.handle_request(scope, receive, send)
    start, *parts = sent
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start.get("headers", ())}
    return HttpAnswer(int(start["status"]), headers, b"".join(one["body"] for one in parts))
