"""An answer in the making, as the one who asked sees it: to read from a thread or from asyncio, or to cancel."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from nightschool.engine.request import Chunk, Generated, GenerationRequest

# A reader in asyncio that waits for a chunk.
Sleeper = tuple[asyncio.AbstractEventLoop, asyncio.Event]

_NO_USAGE = "the last chunk of an answer has its usage"


class Handle:
    """Chunks of one answer. All methods may be called from any thread; chunks are kept, so they may be read twice.

    Args:
        request: What is answered.
        on_cancel: Called at most once, when nobody wants the answer any more.
    """

    def __init__(self, request: GenerationRequest, on_cancel: Callable[[], None]) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._chunks: list[Chunk] = []
        self._changed = threading.Condition()
        self._finished = threading.Event()
        self._readers = 0
        self._sleepers: list[Sleeper] = []
        self._end_sleepers: list[Sleeper] = []

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    def cancel(self) -> None:
        """Stop generating at the next step; nothing happens if the answer is finished."""
        if not self.is_finished:
            self._on_cancel()

    def result(self, timeout_seconds: float | None = None) -> Generated:
        """Wait for the whole answer.

        Raises:
            TimeoutError: If it takes longer; it goes on.
        """
        # One wait for the end, because waking up at every token would slow down the engine.
        if not self._finished.wait(timeout_seconds):
            raise TimeoutError(
                f"The answer to {self.request.id} is not finished after {timeout_seconds} s. Wait longer."
            )
        return self._whole()

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk as it comes; blocks in between. Leaving early cancels the request."""
        seen = 0
        try:
            while not self._ends_before(seen):
                with self._changed:
                    self._readers += 1
                    try:
                        while len(self._chunks) <= seen:
                            self._changed.wait()
                    finally:
                        self._readers -= 1
                yield self._chunks[seen]
                seen += 1
        finally:
            self.cancel()

    async def stream(self) -> AsyncIterator[Chunk]:
        """Every chunk as it comes, for asyncio. Leaving early cancels the request."""
        ready = asyncio.Event()
        sleeper = (asyncio.get_running_loop(), ready)
        seen = 0
        try:
            while not self._ends_before(seen):
                with self._changed:
                    waiting = len(self._chunks) <= seen
                    if waiting:
                        ready.clear()
                        self._sleepers.append(sleeper)
                if waiting:
                    await ready.wait()
                    continue
                yield self._chunks[seen]
                seen += 1
        finally:
            with self._changed:
                if sleeper in self._sleepers:
                    self._sleepers.remove(sleeper)
            self.cancel()

    async def finished(self) -> None:
        """Wait for the end, for asyncio, without waking up at every token. Leaving early cancels the request."""
        ready = asyncio.Event()
        with self._changed:
            waiting = not self._ends_before(len(self._chunks))
            if waiting:
                self._end_sleepers.append((asyncio.get_running_loop(), ready))
        try:
            if waiting:
                await ready.wait()
        finally:
            self.cancel()

    def publish(self, chunk: Chunk) -> list[Sleeper]:
        """Add a chunk; return the asyncio readers to be woken by `wake`. Only the engine calls this."""
        with self._changed:
            self._chunks.append(chunk)
            sleepers, self._sleepers = self._sleepers, []
            if chunk.finish_reason is not None:
                sleepers += self._end_sleepers
            if self._readers:
                self._changed.notify_all()
        if chunk.finish_reason is not None:
            self._finished.set()
        return sleepers

    def _ends_before(self, place: int) -> bool:
        """Whether the chunk before this one was the last."""
        return place > 0 and self._chunks[place - 1].finish_reason is not None

    def _whole(self) -> Generated:
        last = self._chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None, _NO_USAGE
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = tuple(token for chunk in self._chunks for token in chunk.logprobs or ())
        return Generated(
            text="".join(chunk.text for chunk in self._chunks),
            token_ids=tuple(token for chunk in self._chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason,
            usage=last.usage,
            version=self.request.binding.label,
            logprobs=logprobs,
            error=last.error,
        )


def wake(sleepers: Iterable[Sleeper]) -> None:
    """Wake asyncio readers from another thread; all of one event loop at once, because each call is a system call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for loop, ready in sleepers:
        by_loop.setdefault(loop, []).append(ready)
    for loop, events in by_loop.items():
        # A loop that was closed has no readers any more; their requests were cancelled when their streams were.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()
