"""Who may ask: the Host and Origin of browsers, API keys, and the rate of each caller."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nightschool.server.errors import Refusal, error_response
from nightschool.server.settings import ServerSettings, is_loopback

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health"})
_UNLIMITED_PATHS = OPEN_PATHS | {"/metrics"}
_MOST_CALLERS = 10_000
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d+)?")


class Guard:
    """Lets a request through to the app, or answers it with 401, 403 or 429."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._settings = settings
        self._digests = [_digest(key.get_secret_value()) for key in settings.api_keys]
        rate = settings.requests_per_minute
        self._buckets = None if rate is None else TokenBuckets(rate / 60, settings.request_burst, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Refusal as refusal:
                await error_response(scope["path"], refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_browser(scope["method"], path, headers)
        caller = scope["client"][0] if scope.get("client") else "unknown"
        exempt = path in OPEN_PATHS or (path == "/metrics" and self._settings.on_loopback)
        if self._digests and not exempt:
            caller = self._check_key(headers)
            scope["state"]["caller"] = caller
        if self._buckets is not None and path not in _UNLIMITED_PATHS:
            wait_seconds = self._buckets.take(caller)
            if wait_seconds > 0:
                rate = self._settings.requests_per_minute
                raise Refusal(
                    429,
                    f"More than {rate:g} requests a minute came from this caller. Wait {wait_seconds} s.",
                    "rate_limit_exceeded",
                    headers={"Retry-After": str(wait_seconds)},
                )

    def _check_browser(self, method: str, path: str, headers: Headers) -> None:
        """Refuse what only a browser on a foreign page would send.

        A page may post to any address that the browser reaches, loopback too, and a name that
        resolves to 127.0.0.1 (DNS rebinding) makes it same-origin; the Host header gives that away.
        """
        host = headers.get("host", "")
        if self._settings.on_loopback and not self._digests and not self._known_host(host):
            raise Refusal(
                403,
                f"The Host header {host[:200]!r} is not this machine. "
                "Ask for localhost or 127.0.0.1, or start the server with --allowed-hosts NAME.",
                "host_refused",
            )
        changes = method not in ("GET", "HEAD", "OPTIONS") or path == "/refresh_model"
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if changes and (foreign or headers.get("sec-fetch-site") == "cross-site"):
            raise Refusal(
                403, "A page of another origin sent this. Ask from the same origin, or without a browser.", "cross_site"
            )

    def _known_host(self, host: str) -> bool:
        match = _HOST.fullmatch(host.lower())
        return match is not None and (is_loopback(match[1]) or match[1] in self._settings.allowed_hosts)

    def _check_key(self, headers: Headers) -> str:
        """The digest of the key that was sent, as the name of the caller."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        sent = headers.get("x-api-key") or (value.strip() if scheme.lower() == "bearer" else "")
        digest = _digest(sent)
        # Every key is compared, each in constant time, so that timing says nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            what = "The API key is not known" if sent else "There is no API key"
            raise Refusal(
                401,
                f"{what}. Send `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class TokenBuckets:
    """One bucket per caller: `burst` requests at once, then `rate_per_second`. Idle callers are forgotten first."""

    def __init__(self, rate_per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate_per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> int:
        """Take one token; 0 if there was one, else the whole seconds until there is."""
        now = self._clock()
        tokens, at = self._buckets.pop(caller, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        allowed = tokens >= 1
        self._buckets[caller] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - tokens) / self._rate))


def describe(settings: ServerSettings) -> Sequence[str]:
    """What the log says at start about who may ask."""
    keys = (
        f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key; everybody on this machine may ask"
    )
    rate = f"{settings.requests_per_minute:g} requests a minute" if settings.requests_per_minute else "no rate limit"
    return (keys, rate)
