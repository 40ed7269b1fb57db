"""The outermost room of every request: its id, its line in the log, its place in the metrics."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.server.errors import ClientGone, Refusal, error_response
from nightschool.server.logs import request_id
from nightschool.server.metrics import Metrics

log = logging.getLogger("nightschool.server.middleware.request_log")

_PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-", "/generate": "gen-"}


class Access:
    """Gives the request its id (`x-request-id`), counts it, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, templates: Iterable[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._exact, self._patterns = _label_tables(templates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = _PREFIXES.get(scope["path"], "req-") + secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = identity
        token = request_id.set(identity)
        seen = _Seen(send, identity)
        started = time.perf_counter()
        try:
            await self._app(scope, receive, seen.send)
        except ClientGone:
            seen.status = 499  # what nginx writes for a client that went away
        except Exception:
            log.exception("unexpected error")
            if seen.status is None:
                message = f"An unexpected error; the log has it under {identity}. Please report it."
                await error_response(scope["path"], Refusal(500, message, "internal_error"))(scope, receive, seen.send)
        finally:
            self._note(scope, seen.status or 499, time.perf_counter() - started)
            request_id.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = self._label(scope["path"])
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self._metrics.requests.labels(method, path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        client = scope.get("client")
        facts = {
            "method": method,
            "path": path,
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "client": client[0] if client else None,
        }
        log.info("request", extra={"facts": facts | scope["state"].get("facts", {})})

    def _label(self, path: str) -> str:
        """The route of a path, so that strangers cannot make new time series or write into the log."""
        if path in self._exact:
            return path
        return next((template for pattern, template in self._patterns if pattern.fullmatch(path)), "other")


class _Seen:
    """Passes messages on, adds the id, and remembers the status."""

    def __init__(self, send: Send, identity: str) -> None:
        self._send = send
        self._identity = identity.encode()
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self._identity)]}
        await self._send(message)


def _label_tables(templates: Iterable[str]) -> tuple[frozenset[str], list[tuple[re.Pattern[str], str]]]:
    every = list(templates)
    exact = frozenset(template for template in every if "{" not in template)
    patterns = [(re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(t))), t) for t in every if "{" in t]
    return exact, patterns
