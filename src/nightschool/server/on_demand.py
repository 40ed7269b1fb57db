"""Slots that are opened when somebody asks for them, and closed again when others are asked for more.

A key is a bare name, whose slot follows its champion, or `name@version`, whose slot stays with that version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from nightschool.engine.slot import Slot

log = logging.getLogger("nightschool.server.on_demand")

# Versions that are read from the disk at the same time.
_LOADING_THREADS = 4


class OnDemand:
    """The slots that are open now. All of it belongs to the event loop, which waits for nothing: slots load on threads.

    Args:
        open_slot: Makes the empty slot of a key.
        most: Slots that stay open; over it, the idle one that was asked for longest ago is closed. Busy ones stay.
        most_bytes: What their weights may take; over it, the same. The newest one stays, whatever it takes.
    """

    def __init__(self, open_slot: Callable[[str], Slot], most: int, most_bytes: int | None = None) -> None:
        self._open_slot = open_slot
        self._most = most
        self._most_bytes = most_bytes
        self.num_evicted = 0
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Slot]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="load")

    def slots(self) -> list[Slot]:
        """What is open, least recently asked for first."""
        return list(self._slots.values())

    def get(self, key: str) -> Slot | None:
        """An open slot, which becomes the one that was asked for last."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
        return slot

    async def load(self, key: str) -> Slot:
        """An open slot, opened if need be; who asks meanwhile waits for the same one, even if the first one goes away.

        Raises:
            NightschoolError: Why it cannot be served.
        """
        slot = self.get(key)
        if slot is not None:
            return slot
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(key), name=f"load {key}")
            task.add_done_callback(partial(self._loaded, key))
        return await asyncio.shield(task)

    async def unload(self, key: str) -> bool:
        """Close a slot once it has answered what it took. Returns whether it was open."""
        loading = self._loading.get(key)
        if loading is not None:
            await asyncio.wait([loading])
        slot = self._slots.pop(key, None)
        if slot is None:
            return False
        await self._close(slot)
        return True

    async def close(self) -> None:
        """Open nothing more, and close all slots; what they were answering ends as cancelled."""
        for task in list(self._loading.values()):
            with contextlib.suppress(Exception):  # whoever asked for it was told
                await task
        while self._slots:
            _, slot = self._slots.popitem()
            await self._on_thread(slot.close)
        await asyncio.gather(*self._closing)
        await asyncio.to_thread(self._threads.shutdown)

    async def _load(self, key: str) -> Slot:
        slot = self._open_slot(key)
        try:
            await self._on_thread(slot.refresh)
        except BaseException:
            await self._on_thread(slot.close)
            raise
        self._slots[key] = slot
        self._close_idle()
        return slot

    def _loaded(self, key: str, task: asyncio.Task[Slot]) -> None:
        del self._loading[key]
        if not task.cancelled() and task.exception() is not None:
            log.error("a model could not be loaded", extra={"facts": {"model": key, "error": str(task.exception())}})

    def _close_idle(self) -> None:
        num_bytes = {key: slot.num_bytes for key, slot in self._slots.items()}
        # The newest is what somebody waits for.
        for key in list(self._slots)[:-1]:
            fits = self._most_bytes is None or sum(num_bytes.values()) <= self._most_bytes
            if len(self._slots) <= self._most and fits:
                return
            if self._slots[key].is_idle:
                del num_bytes[key]
                self.num_evicted += 1
                self._later(self._close(self._slots.pop(key), keep=True))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, slot: Slot, *, keep: bool = False) -> None:
        await self._on_thread(partial(slot.close, drain=True, keep=keep))

    async def _on_thread(self, work: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)
