"""Look-ups in the database that every request needs: kept for a second, off the event loop, one at a time for each key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

from nightschool.server.errors import Refusal

log = logging.getLogger("nightschool.server.middleware.lookups")

Key = TypeVar("Key")
Value = TypeVar("Value")

FRESH_SECONDS = 1.0
"""How long a look-up is believed: what was changed in the database counts after that."""
_LONGEST_SECONDS = 10.0
_MOST_KEPT = 10_000


class Lookup(Generic[Key, Value]):
    """Answers from what it found in the last second, or looks again on a thread.

    Args:
        look: Finds the value of a key; None is no value, and is not kept.
        thread: Where it looks.
        clock: Seconds.
    """

    def __init__(
        self, look: Callable[[Key], Value | None], thread: Executor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look, self._thread, self._clock = look, thread, clock
        self._kept: OrderedDict[Key, tuple[float, Value]] = OrderedDict()
        self._under_way: dict[Key, asyncio.Future[Value | None]] = {}

    async def get(self, key: Key) -> Value | None:
        """The value of a key, at most a second old.

        Raises:
            Refusal: 503 if the database does not say. What was found before counts no more then.
        """
        at, value = self._kept.get(key, (0.0, None))
        if value is not None and self._clock() - at < FRESH_SECONDS:
            return value
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking(key)), _LONGEST_SECONDS)
        except Exception as error:  # whatever it is, nobody knows who may ask what, and so nobody may
            log.error("a look-up in the database failed", extra={"facts": {"error": str(error) or repr(error)}})
            raise Refusal(
                503,
                "The database that holds API keys and limits does not answer; the log says why. Try again soon.",
                "keys_unavailable",
                headers={"Retry-After": "2"},
            ) from error

    def forget(self, key: Key) -> None:
        """Look again at the next request: this process has changed the value."""
        self._kept.pop(key, None)

    def _looking(self, key: Key) -> asyncio.Future[Value | None]:
        looking = self._under_way.get(key)
        if looking is None:
            began = self._clock()
            looking = self._under_way[key] = asyncio.get_running_loop().run_in_executor(self._thread, self._look, key)
            looking.add_done_callback(lambda done: self._found(key, began, done))
        return looking

    def _found(self, key: Key, began: float, done: asyncio.Future[Value | None]) -> None:
        del self._under_way[key]
        self._kept.pop(key, None)
        if done.cancelled() or done.exception() is not None:
            return
        value = done.result()
        if value is not None:
            self._kept[key] = began, value
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
