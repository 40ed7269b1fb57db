"""Who may ask: the Host and Origin of browsers, API keys with what they may do, and the rate of each caller."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nightschool.server.errors import Refusal, error_response
from nightschool.server.settings import ServerSettings, is_address, is_loopback
from nightschool.store.principal import LOCAL, Principal
from nightschool.store.principal import Scope as Permission

Key = TypeVar("Key")
Value = TypeVar("Value")

_GENERATES = frozenset({"/v1/chat/completions", "/v1/completions", "/generate"})
_TELLS = ("/api/feedback", "/api/conversations/")
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health"})
_UNLIMITED_PATHS = OPEN_PATHS | {"/metrics"}
_MOST_CALLERS = 10_000
_FAILED_KEYS_PER_MINUTE = 10
_FAILED_KEYS_AT_ONCE = 10
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d+)?")


class Guard:
    """Lets a request through to the app, or answers it with 401, 403 or 429."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._settings = settings
        digests = {_digest(key.key.get_secret_value()): key.principal for key in settings.api_keys}
        self._principals = {digest: replace(who, key=digest.hex()) for digest, who in digests.items()}
        self._hosts = set(settings.allowed_hosts)
        if self._principals:
            self._hosts |= {settings.host.lower(), socket.gethostname().lower()}
        rate = settings.requests_per_minute
        self._buckets = None if rate is None else TokenBuckets(rate / 60, settings.request_burst, clock)
        self._guesses = TokenBuckets(_FAILED_KEYS_PER_MINUTE / 60, _FAILED_KEYS_AT_ONCE, clock)
        self._seen_keys: OrderedDict[tuple[str, str], None] = OrderedDict()

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
        scope["state"]["principal"] = LOCAL
        if self._principals and not exempt:
            digest = self._check_key(headers, caller)
            caller = digest.hex()
            scope["state"]["caller"], scope["state"]["principal"] = caller, self._principals[digest]
            _check_scope(self._principals[digest], scope["method"], path)
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
        if not self._known_host(host):
            raise Refusal(
                403,
                f"The Host header {host[:200]!r} is not a name of this server. Ask for its address, "
                "or start the server with --allowed-hosts NAME.",
                "host_refused",
            )
        origin = headers.get("origin")
        foreign = origin is not None and _host_of(origin) != host.lower()
        if is_change(method, path) and (foreign or headers.get("sec-fetch-site") == "cross-site"):
            raise Refusal(
                403, "A page of another origin sent this. Ask from the same origin, or without a browser.", "cross_site"
            )

    def _known_host(self, host: str) -> bool:
        """Whether the Host header is a name of this server; an attacker's page has a name of its own there.

        Without keys only loopback names and the allowed ones will do. With keys others may reach the server, so its
        own names and every bare address will do too: rebinding needs a name.
        """
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1]
        by_address = bool(self._principals) and is_address(name)
        return is_loopback(name) or by_address or name in self._hosts or "*" in self._hosts

    def _check_key(self, headers: Headers, address: str) -> bytes:
        """The digest of the key that was sent.

        Wrong keys empty a bucket of the address that they come from. Once it is empty, no key from there is looked at,
        right or wrong, or a guesser would still learn which is right; only keys that it has used before still open.
        """
        scheme, _, value = headers.get("authorization", "").partition(" ")
        sent = headers.get("x-api-key") or (value.strip() if scheme.lower() == "bearer" else "")
        if not sent:
            raise _no_entry("There is no API key")
        digest = _digest(sent)
        caller = digest.hex()
        wait_seconds = 0 if (address, caller) in self._seen_keys else self._guesses.wait(address)
        if wait_seconds > 0:
            message = f"Too many wrong API keys came from this address. Wait {wait_seconds} s."
            raise Refusal(429, message, "too_many_wrong_keys", headers={"Retry-After": str(wait_seconds)})
        # Every key is compared, each in constant time, so that timing says nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._principals]
        if not any(matches):
            self._guesses.take(address)
            raise _no_entry("The API key is not known")
        _remember(self._seen_keys, (address, caller), None)
        return digest


def scope_needed(method: str, path: str) -> Permission | None:
    """What a key must be allowed to do for a request; None where every key will do."""
    if path in _GENERATES:
        return "generate"
    if path.startswith(_TELLS):
        return "feedback"
    return "manage" if is_change(method, path) else None


def is_change(method: str, path: str) -> bool:
    """Whether a request may change something: all but plain reading."""
    return method not in ("GET", "HEAD", "OPTIONS") or path == "/refresh_model"


def _check_scope(principal: Principal, method: str, path: str) -> None:
    needed = scope_needed(method, path)
    if needed is not None and needed not in principal.scopes:
        raise Refusal(
            403,
            f"This API key may not do that: it lacks the scope {needed!r}. It has "
            f"{', '.join(sorted(principal.scopes)) or 'none'}.",
            "scope_missing",
        )


def _no_entry(what: str) -> Refusal:
    message = f"{what}. Send `Authorization: Bearer KEY` or `x-api-key: KEY`."
    return Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host_of(origin: str) -> str | None:
    """Host and port of an Origin header; None if it has none, or is not an address at all."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class TokenBuckets:
    """One bucket per caller: `burst` requests at once, then `rate_per_second`. Idle callers are forgotten first."""

    def __init__(self, rate_per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate_per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> int:
        """Take one token; 0 if there was one, else the whole seconds until there is."""
        wait_seconds, tokens = self.wait(caller), self._tokens(caller)
        _remember(self._buckets, caller, (tokens if wait_seconds else tokens - 1, self._clock()))
        return wait_seconds

    def wait(self, caller: str) -> int:
        """The whole seconds until there is a token; 0 if there is one. Takes none."""
        tokens = self._tokens(caller)
        return 0 if tokens >= 1 else max(1, math.ceil((1 - tokens) / self._rate))

    def _tokens(self, caller: str) -> float:
        now = self._clock()
        tokens, at = self._buckets.get(caller, (float(self._burst), now))
        return min(self._burst, tokens + (now - at) * self._rate)


def _remember(known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Keep a value as the newest; what was not seen for longest goes first."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MOST_CALLERS:
        known.popitem(last=False)


def describe(settings: ServerSettings) -> Sequence[str]:
    """What the log says at start about who may ask."""
    keys = (
        f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key; everybody on this machine may ask"
    )
    rate = f"{settings.requests_per_minute:g} requests a minute" if settings.requests_per_minute else "no rate limit"
    return (keys, rate)
