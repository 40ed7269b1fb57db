"""How much each caller and each tenant may ask: 429 with Retry-After over it, and OpenAI's headers on every answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightschool.events import now
from nightschool.server.access_store import AccessStore
from nightschool.server.errors import Refusal, error_response
from nightschool.server.middleware.auth import OPEN_PATHS
from nightschool.server.middleware.buckets import Rate, TokenBuckets
from nightschool.server.middleware.route_rules import rule_of
from nightschool.server.settings import ServerSettings
from nightschool.store.principal import Principal
from nightschool.store.tenants import Quota, Usage

_UNLIMITED = OPEN_PATHS | {"/metrics"}


class Quotas:
    """Refuses what is over a bound, and counts what was used.

    The rate of the settings is that of one key, or of one address without keys. The quota of a tenant is that of all
    its keys: its rate is kept by each server for itself, its tokens of the day by all that share the database. An
    answer that has begun is finished, so that the last ones of a day may go over.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        access: AccessStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._access = access
        rate = settings.requests_per_minute
        self._rate = None if rate is None else Rate(rate / 60, settings.request_burst)
        self._buckets = TokenBuckets(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["state"]["template"] in _UNLIMITED:
            await self._app(scope, receive, send)
            return
        principal: Principal = scope["state"]["principal"]
        headers: dict[str, str] = {}

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in headers.items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            quota = await self._access.quota(principal.tenant)
            self._take(scope, principal, quota, headers)
            await self._check_tokens(scope, principal, quota, headers)
        except Refusal as refusal:
            await error_response(scope["path"], refusal)(scope, receive, with_headers)
            return
        try:
            await self._app(scope, receive, with_headers)
        finally:
            facts = scope["state"].get("facts", {})
            used = Usage(1, facts.get("tokens_in", 0), facts.get("tokens_out", 0))
            self._access.count(principal, used)

    def _take(self, scope: Scope, principal: Principal, quota: Quota, headers: dict[str, str]) -> None:
        """Take a request out of every bucket that it needs, or out of none."""
        address = scope["client"][0] if scope.get("client") else "unknown"
        wanted: list[tuple[str, Rate, str]] = []
        if self._rate is not None:
            wanted.append((principal.key or address, self._rate, "this caller"))
        if quota.requests_per_minute is not None:
            most = quota.requests_per_minute
            wanted.append((f"tenant {principal.tenant}", Rate(most / 60, max(1.0, most)), "this tenant"))
        if not wanted:
            return
        caller, rate, whose = min(wanted, key=lambda one: self._buckets.room(one[0], one[1]).requests)
        wait_seconds = max(self._buckets.room(*one[:2]).wait_seconds for one in wanted)
        if not wait_seconds:
            for one in wanted:
                self._buckets.take(*one[:2])
        room = self._buckets.room(caller, rate)
        headers["x-ratelimit-limit-requests"] = f"{rate.per_second * 60:g}"
        headers["x-ratelimit-remaining-requests"] = str(room.requests)
        headers["x-ratelimit-reset-requests"] = written_duration(room.full_seconds)
        if wait_seconds:
            raise Refusal(
                429,
                f"More than {rate.per_second * 60:g} requests a minute came from {whose}. Wait {wait_seconds} s.",
                "rate_limit_exceeded",
                headers={"Retry-After": str(wait_seconds)},
            )

    async def _check_tokens(self, scope: Scope, principal: Principal, quota: Quota, headers: dict[str, str]) -> None:
        if rule_of(scope["method"], scope["state"]["template"]).scope == "infer":
            await check_tokens(self._access, principal, quota, headers)


async def check_tokens(
    access: AccessStore, principal: Principal, quota: Quota, headers: dict[str, str] | None = None
) -> None:
    """Refuse to generate for a tenant that has had its tokens of the day.

    Args:
        access: Knows what was used.
        principal: Who asks.
        quota: What its tenant may use.
        headers: Gets what the answer says of the tokens that are left.

    Raises:
        Refusal: 429.
    """
    most = quota.tokens_per_day
    if most is None:
        return
    used = await access.generated_today(principal.tenant)
    moment = now()
    midnight = (moment + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    seconds = (midnight - moment).total_seconds()
    if headers is not None:
        headers["x-ratelimit-limit-tokens"] = str(most)
        headers["x-ratelimit-remaining-tokens"] = str(max(0, most - used))
        headers["x-ratelimit-reset-tokens"] = written_duration(seconds)
    if used >= most:
        raise Refusal(
            429,
            f"This tenant may have {most} tokens generated a day, and has had {used}. Come again after midnight UTC.",
            "quota_exceeded",
            headers={"Retry-After": str(math.ceil(seconds))},
        )


def written_duration(seconds: float) -> str:
    """As OpenAI writes it: `0s`, `6m0s`, `23h59m59s`."""
    hours, rest = divmod(math.ceil(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{left}s"
