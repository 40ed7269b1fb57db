"""Server-sent events that stop when the client goes away."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from nightschool.errors import NightschoolError
from nightschool.server.errors import ClientGone, Refusal, openai_error, refusal_of
from nightschool.server.generation import while_connected


class EventStream(Response):
    """Sends each event as it comes, then `[DONE]`; an error becomes a last event in OpenAI's spelling.

    `at_end` is called once, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], headers: dict[str, str], at_end: Callable[[], None]
    ) -> None:
        self._events = events
        self._at_end = at_end
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"} | headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            scope["state"]["facts"] = {"outcome": "the client went away"}
            raise
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        try:
            async for event in self._events:
                await _send_event(send, json.dumps(event, ensure_ascii=False))
            await _send_event(send, "[DONE]")
        except (NightschoolError, Refusal) as error:
            # The status is out already, so the error goes where OpenAI's clients look for it.
            refusal = error if isinstance(error, Refusal) else refusal_of(error)
            await _send_event(send, json.dumps({"error": openai_error(refusal)}))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
