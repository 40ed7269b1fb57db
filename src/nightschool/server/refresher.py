"""Looks for promoted versions of every name: at once at start, then at an interval, and whenever somebody asks.

Where names are served on demand, a look at their alias files, which costs a `stat` each, finds a promotion within a quarter of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from nightschool.engine.slot import Slot
from nightschool.errors import NightschoolError, NotFound
from nightschool.server.metrics import Metrics
from nightschool.server.served_names import ServedNames

log = logging.getLogger("nightschool.server.refresher")
Result = TypeVar("Result")

_LOOK_SECONDS = 0.25


class Refresher:
    """Everything that moves a slot runs on one thread of its own: never on the event loop, never twice at once."""

    def __init__(self, names: ServedNames, metrics: Metrics, interval_seconds: float) -> None:
        self._names = names
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._watching: list[asyncio.Task[None]] = []
        self._last_errors: dict[str, str] = {}

    def last_error(self, name: str) -> str | None:
        """Why the newest version of a name is not served; None if it is."""
        return self._last_errors.get(name)

    async def refresh(self, slot: Slot) -> bool:
        """Serve the champion of a name if it is not served already. Returns whether the version changed.

        Raises:
            NightschoolError: Why it could not be served; whatever served before still does.
        """
        return await self.alone(partial(self._refresh, slot))

    async def alone(self, move: Callable[[], Result]) -> Result:
        """Run a function on the thread that moves the slots; it goes on even if the caller goes away."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, move))

    def _refresh(self, slot: Slot) -> bool:
        before = slot.current
        log.info("looking for a promoted version", extra={"facts": {"name": slot.name}})
        try:
            swapped = slot.refresh()
        except NotFound as error:
            if before is not None:
                self._failed(slot, error)
                raise
            log.info("no version is promoted yet", extra={"facts": {"name": slot.name}})
            self._metrics.refreshes.labels("unchanged").inc()
            return False
        except Exception as error:
            self._failed(slot, error)
            raise
        self._last_errors.pop(slot.name, None)
        self._metrics.refreshes.labels("swapped" if swapped else "unchanged").inc()
        if swapped and slot.current is not None:
            log.info("successfully updated", extra={"facts": {"version": slot.current.version.ref}})
        return swapped

    def _failed(self, slot: Slot, error: Exception) -> None:
        message = self._last_errors[slot.name] = str(error) or type(error).__name__
        self._metrics.refreshes.labels("failed").inc()
        current = slot.current
        facts = {"name": slot.name, "error": message, "still_serving": current.version.ref if current else None}
        unexpected = not isinstance(error, NightschoolError)
        log.error("error updating the model", exc_info=error if unexpected else None, extra={"facts": facts})

    def start(self) -> None:
        """Begin to watch; the first look is at once, and the server answers meanwhile."""
        self._watching = [asyncio.create_task(self._watch(), name="model watcher")]
        if self._names.on_demand is not None:
            self._watching.append(asyncio.create_task(self._watch_marks(), name="alias watcher"))

    async def _watch(self) -> None:
        while True:
            await self._refresh_all(list(self._names))
            await asyncio.sleep(self._interval_seconds)

    async def _watch_marks(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._refresh_all(await asyncio.to_thread(self._names.moved))

    async def _refresh_all(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            # The error is logged and counted where it happened; the next look may succeed.
            with contextlib.suppress(Exception):
                await self.refresh(slot)

    async def stop(self) -> None:
        """Stop watching and wait for the look that is under way."""
        for task in self._watching:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(partial(self._thread.shutdown, wait=True, cancel_futures=True))
