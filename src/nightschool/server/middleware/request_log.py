"""The outermost room of every request: its id, its line in the log, its place in the metrics."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.server.errors import ClientGone, Refusal, error_response
from nightschool.server.logs import request_id
from nightschool.server.metrics import Metrics
from nightschool.server.middleware.route_rules import RouteTable

log = logging.getLogger("nightschool.server.middleware.request_log")

_PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-", "/generate": "gen-"}


class Access:
    """Gives the request its id (`x-request-id`) and its route, counts it, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: RouteTable) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = _PREFIXES.get(scope["path"], "req-") + secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"] = identity
        # The route of the path, so that strangers cannot make new time series or write into the log.
        state["template"] = self._routes.template_of(scope)
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
        path = scope["state"]["template"]
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
