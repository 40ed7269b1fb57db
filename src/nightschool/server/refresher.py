"""Looks for promoted versions: at once at start, then at an interval, and whenever somebody asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from nightschool.errors import NightschoolError, NotFound
from nightschool.server.metrics import Metrics
from nightschool.server.ports import SlotPort

log = logging.getLogger("nightschool.server.refresher")
Result = TypeVar("Result")


class Refresher:
    """Everything that moves the slot runs on one thread of its own: never on the event loop, never twice at once."""

    def __init__(self, slot: SlotPort, metrics: Metrics, interval_seconds: float) -> None:
        self._slot = slot
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._watching: asyncio.Task[None] | None = None
        self.last_error: str | None = None

    async def refresh(self) -> bool:
        """Serve the champion if it is not served already. Returns whether the version changed.

        Raises:
            NightschoolError: Why it could not be served; whatever served before still does.
        """
        return await self.alone(self._refresh)

    async def alone(self, move: Callable[[], Result]) -> Result:
        """Run a function on the thread that moves the slot; it goes on even if the caller goes away."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, move))

    def _refresh(self) -> bool:
        before = self._slot.current
        log.info("looking for a promoted version", extra={"facts": {"name": self._slot.name}})
        try:
            swapped = self._slot.refresh()
        except NotFound as error:
            if before is not None:
                self._failed(error)
                raise
            log.info("no version is promoted yet", extra={"facts": {"name": self._slot.name}})
            self._metrics.refreshes.labels("unchanged").inc()
            return False
        except Exception as error:
            self._failed(error)
            raise
        self.last_error = None
        self._metrics.refreshes.labels("swapped" if swapped else "unchanged").inc()
        if swapped and self._slot.current is not None:
            log.info("successfully updated", extra={"facts": {"version": self._slot.current.version.ref}})
        return swapped

    def _failed(self, error: Exception) -> None:
        self.last_error = str(error) or type(error).__name__
        self._metrics.refreshes.labels("failed").inc()
        current = self._slot.current
        facts = {"error": self.last_error, "still_serving": current.version.ref if current else None}
        unexpected = not isinstance(error, NightschoolError)
        log.error("error updating the model", exc_info=error if unexpected else None, extra={"facts": facts})

    def start(self) -> None:
        """Begin to watch; the first look is at once, and the server answers meanwhile."""
        self._watching = asyncio.create_task(self._watch(), name="model watcher")

    async def _watch(self) -> None:
        while True:
            # The error is logged and counted where it happened; the next look may succeed.
            with contextlib.suppress(Exception):
                await self.refresh()
            await asyncio.sleep(self._interval_seconds)

    async def stop(self) -> None:
        """Stop watching and wait for the look that is under way."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await asyncio.to_thread(partial(self._thread.shutdown, wait=True, cancel_futures=True))
