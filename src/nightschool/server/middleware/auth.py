"""Who may ask: the Host and Origin of browsers, and API keys with what they may do."""

from __future__ import annotations

import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nightschool.server.errors import Refusal, error_response
from nightschool.server.middleware.buckets import Rate, TokenBuckets, remember
from nightschool.server.middleware.keyring import Keyring
from nightschool.server.middleware.route_rules import Rule, is_change, rule_of
from nightschool.server.settings import ServerSettings, is_address, is_loopback
from nightschool.store.api_keys import digest_of
from nightschool.store.principal import DEFAULT_TENANT, LOCAL, Principal

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health", "/api/v1/health"})
_GUESSES = Rate(10 / 60, 10)
"""Wrong keys of one address."""
# mem0's client says `Token`.
_SCHEMES = ("bearer", "token")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d+)?")


class Guard:
    """Lets a request through to the app as its principal's, or answers it with 401, 403 or 429."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        keyring: Keyring,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._guesses = TokenBuckets(clock)
        self._seen_keys: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await self._check(scope)
            except Refusal as refusal:
                await error_response(scope["path"], refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        headers, state = Headers(scope=scope), scope["state"]
        method, template = scope["method"], state["template"]
        # Health checks are answered whether or not the database is.
        exempt = template in OPEN_PATHS or (template == "/metrics" and self._settings.on_loopback)
        needs_key = self._keyring.was_needed if exempt else await self._keyring.is_needed()
        self._check_browser(method, template, headers, by_address=needs_key)
        address = scope["client"][0] if scope.get("client") else "unknown"
        state["principal"] = LOCAL
        if exempt:
            return
        sent = _key_of(headers)
        principal = await self._principal_of(sent, address) if sent else None
        if principal is not None:
            state["principal"] = principal
            check_scope(principal, rule_of(method, template))
        elif self._keyring.was_needed:
            raise _no_entry(
                "The API key is not known, or was revoked, or has expired" if sent else "There is no API key"
            )

    def _check_browser(self, method: str, template: str, headers: Headers, *, by_address: bool) -> None:
        """Refuse what only a browser on a foreign page would send.

        A page may post to any address that the browser reaches, loopback too, and a name that
        resolves to 127.0.0.1 (DNS rebinding) makes it same-origin; the Host header gives that away.
        """
        host = headers.get("host", "")
        if not self._known_host(host, by_address=by_address):
            raise Refusal(
                403,
                f"The Host header {host[:200]!r} is not a name of this server. Ask for its address, "
                "or start the server with --allowed-hosts NAME.",
                "host_refused",
            )
        origin = headers.get("origin")
        foreign = origin is not None and _host_of(origin) != host.lower()
        if is_change(method, template) and (foreign or headers.get("sec-fetch-site") == "cross-site"):
            raise Refusal(
                403, "A page of another origin sent this. Ask from the same origin, or without a browser.", "cross_site"
            )

    def _known_host(self, host: str, *, by_address: bool) -> bool:
        """Whether the Host header is a name of this server; an attacker's page has a name of its own there.

        Without keys only loopback names and the allowed ones will do. With keys others may reach the server, so its
        own names and every bare address will do too (`by_address`): rebinding needs a name.
        """
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name, allowed = match[1], self._settings.allowed_hosts
        own = by_address and (is_address(name) or name in (self._settings.host.lower(), socket.gethostname().lower()))
        return is_loopback(name) or own or name in allowed or "*" in allowed

    async def _principal_of(self, key: str, address: str) -> Principal | None:
        """Who asks with a key; None if it opens nothing.

        Wrong keys empty a bucket of the address that they come from. Once it is empty, no key from there is looked at,
        right or wrong, or a guesser would still learn which is right; only keys that it has used before still open.
        """
        caller = (address, digest_of(key))
        wait_seconds = 0 if caller in self._seen_keys else self._guesses.room(address, _GUESSES).wait_seconds
        if wait_seconds > 0:
            message = f"Too many wrong API keys came from this address. Wait {wait_seconds} s."
            raise Refusal(429, message, "too_many_wrong_keys", headers={"Retry-After": str(wait_seconds)})
        principal = await self._keyring.principal_of(key)
        if principal is not None:
            remember(self._seen_keys, caller, None)
            return principal
        self._seen_keys.pop(caller, None)
        if await self._keyring.is_needed():
            self._guesses.take(address, _GUESSES)
        return None


def _key_of(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (value.strip() if scheme.lower() in _SCHEMES else "")


def check_scope(principal: Principal, rule: Rule) -> None:
    """Refuse a key that lacks what a rule asks for.

    Raises:
        Refusal: 403.
    """
    if rule.operator and principal.tenant != DEFAULT_TENANT:
        message = "This tells of everybody's requests, so only keys of the default tenant may ask for it."
        raise Refusal(403, message, "operators_only")
    if rule.scope is not None and rule.scope not in principal.scopes:
        raise Refusal(
            403,
            f"This API key may not do that: it lacks the scope {rule.scope!r}. It has "
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


async def describe(settings: ServerSettings, keyring: Keyring) -> Sequence[str]:
    """What the log says at start about who may ask."""
    keys = "API keys are needed" if await keyring.is_needed() else "no API key; everybody on this machine may ask"
    rate = f"{settings.requests_per_minute:g} requests a minute" if settings.requests_per_minute else "no rate limit"
    return (keys, rate)
