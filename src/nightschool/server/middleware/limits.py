"""Bounds on what a request may bring: the body is read here, whole, or refused; files pass through, counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.server.errors import ClientGone, Refusal, error_response

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64_000_000


@dataclass(frozen=True)
class Bounds:
    """The largest body in bytes, and the longest time that it may take to arrive."""

    max_bytes: int
    timeout_seconds: float

    def check_declared(self, scope: Scope) -> None:
        """Refuse what says itself that it is too large."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self.max_bytes:
            raise self.too_large(f"{declared[:20]} bytes")

    def too_large(self, what: str) -> Refusal:
        message = f"The body has {what}, and at most {self.max_bytes} are accepted. Send less."
        return Refusal(413, message, "body_too_large")

    def too_slow(self) -> Refusal:
        message = f"The body did not arrive within {self.timeout_seconds:g} s. Send it faster."
        return Refusal(408, message, "request_timeout")


class BodyLimit:
    """Reads the body within its bounds, then hands it to the app in one piece.

    Counting while the app reads would not do: routes turn whatever goes wrong there into a 400.
    After the body, `receive` waits for the client to go away, which is how generation is cancelled.

    Args:
        app: What is behind it.
        bounds: Of every body.
        of_paths: Paths whose bodies have other bounds, and are read whole all the same.
        streamed: Paths whose POST has bounds of its own, and reads the body piece by piece as it comes.
    """

    def __init__(
        self, app: ASGIApp, *, bounds: Bounds, of_paths: Mapping[str, Bounds], streamed: Mapping[str, Bounds]
    ) -> None:
        self._app = app
        self._bounds = bounds
        self._of_paths = of_paths
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        streamed = self._streamed.get(scope["path"]) if scope["method"] == "POST" else None
        bounds = self._of_paths.get(scope["path"], self._bounds)
        try:
            if streamed is not None:
                streamed.check_declared(scope)
                body = _PassingBody(streamed, receive, send)
                await self._app(scope, body.receive, body.send)
                return
            whole = await asyncio.wait_for(_read(scope, receive, bounds), bounds.timeout_seconds)
        except TimeoutError:
            await _refuse(scope, receive, send, bounds.too_slow())
            return
        except Refusal as refusal:
            await _refuse(scope, receive, send, refusal)
            return
        await self._app(scope, _replayed(whole, receive), send)


async def _read(scope: Scope, receive: Receive, bounds: Bounds) -> bytes:
    bounds.check_declared(scope)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > bounds.max_bytes:
            raise bounds.too_large(f"more than {bounds.max_bytes} bytes")
        if not message.get("more_body", False):
            return bytes(body)


class _PassingBody:
    """A body that a route reads as it comes; what the route leaves unread is thrown away before its answer ends."""

    def __init__(self, bounds: Bounds, receive: Receive, send: Send) -> None:
        self._bounds, self._receive, self._send = bounds, receive, send
        self._deadline = asyncio.get_running_loop().time() + bounds.timeout_seconds
        self._num_bytes = 0
        self._ended = False

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise self._bounds.too_slow() from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._num_bytes += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._num_bytes > self._bounds.max_bytes:
            raise self._bounds.too_large(f"more than {self._bounds.max_bytes} bytes")
        return message

    async def send(self, message: Message) -> None:
        if not self._ended and message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        elif not self._ended and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await _discard_a_while(self._receive)
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answer at once, then throw away a bounded rest of the body.

    A socket that is closed with bytes unread is reset, and the client would never see the answer.
    """
    refusal.headers["Connection"] = "close"
    held: list[Message] = []

    async def all_but_the_end(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            held.append({"type": "http.response.body", "body": b"", "more_body": False})
            message = {**message, "more_body": True}
        await send(message)

    await error_response(scope["path"], refusal)(scope, receive, all_but_the_end)
    await _discard_a_while(receive)
    for message in held:
        await send(message)


async def _discard_a_while(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_discard(receive), _LINGER_SECONDS)


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded < _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        discarded += len(message.get("body", b""))
