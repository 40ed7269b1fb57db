"""Token buckets: how often each caller may come."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
_MOST_CALLERS = 10_000


@dataclass(frozen=True)
class Rate:
    """`burst` requests at once, then `per_second`."""

    per_second: float
    burst: float


@dataclass(frozen=True)
class Room:
    """What a bucket holds: whole requests that may come now, and seconds until one more may, and until it is full."""

    requests: int
    wait_seconds: int
    full_seconds: float


class TokenBuckets:
    """One bucket for each caller. Idle callers are forgotten first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, rate: Rate) -> int:
        """Take one token; 0 if there was one, else the whole seconds until there is."""
        wait_seconds, tokens = self.room(caller, rate).wait_seconds, self._tokens(caller, rate)
        remember(self._buckets, caller, (tokens if wait_seconds else tokens - 1, self._clock()))
        return wait_seconds

    def room(self, caller: str, rate: Rate) -> Room:
        """What there is now. Takes nothing."""
        tokens = self._tokens(caller, rate)
        wait_seconds = 0 if tokens >= 1 else max(1, math.ceil((1 - tokens) / rate.per_second))
        return Room(max(0, math.floor(tokens)), wait_seconds, (rate.burst - tokens) / rate.per_second)

    def _tokens(self, caller: str, rate: Rate) -> float:
        now = self._clock()
        tokens, at = self._buckets.get(caller, (rate.burst, now))
        return min(rate.burst, tokens + (now - at) * rate.per_second)


def remember(known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Keep a value as the newest; what was not seen for longest goes first."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MOST_CALLERS:
        known.popitem(last=False)
