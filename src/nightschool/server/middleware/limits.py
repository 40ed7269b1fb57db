"""Bounds on what a request may bring: the body is read here, whole, or refused."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.server.errors import ClientGone, Refusal, error_response

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64_000_000


class BodyLimit:
    """Reads the body up to `max_bytes` and within `timeout_seconds`, then hands it to the app in one piece.

    Counting while the app reads would not do: routes turn whatever goes wrong there into a 400.
    After the body, `receive` waits for the client to go away, which is how generation is cancelled.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout_seconds)
        except TimeoutError:
            message = f"The body did not arrive within {self._timeout_seconds:g} s. Send it faster."
            await _refuse(scope, receive, send, Refusal(408, message, "request_timeout"))
            return
        except Refusal as refusal:
            await _refuse(scope, receive, send, refusal)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large(f"{declared[:20]} bytes")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large(f"more than {self._max_bytes} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self, what: str) -> Refusal:
        message = f"The body has {what}, and at most {self._max_bytes} are accepted. Send less text."
        return Refusal(413, message, "body_too_large")


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
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_discard(receive), _LINGER_SECONDS)
    for message in held:
        await send(message)


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded < _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        discarded += len(message.get("body", b""))
