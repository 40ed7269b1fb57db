"""An answer in the making, as the one who asked sees it: to read from a thread or from asyncio, or to cancel."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from nightschool.engine.request import Chunk, Generated, GenerationRequest

_NO_USAGE = "the last chunk of an answer has its usage"


class Handle:
    """Chunks of one answer. All methods may be called from any thread; chunks are kept, so they may be read twice.

    Args:
        request: What is answered.
        version: The reference of the version that answers.
        on_cancel: Called at most once, when nobody wants the answer any more.
    """

    def __init__(self, request: GenerationRequest, version: str, on_cancel: Callable[[], None]) -> None:
        self.request = request
        self.version = version
        self._on_cancel = on_cancel
        self._chunks: list[Chunk] = []
        self._changed = threading.Condition()
        self._finished = threading.Event()
        self._readers = 0
        self._wakers: list[Callable[[], None]] = []
        self._end_wakers: list[Callable[[], None]] = []

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
        index = 0
        try:
            while True:
                with self._changed:
                    self._readers += 1
                    try:
                        while len(self._chunks) <= index:
                            self._changed.wait()
                    finally:
                        self._readers -= 1
                while index < len(self._chunks):
                    chunk = self._chunks[index]
                    index += 1
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        finally:
            self.cancel()

    async def stream(self) -> AsyncIterator[Chunk]:
        """Every chunk as it comes, for asyncio. Leaving early cancels the request."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        index = 0
        try:
            while True:
                with self._changed:
                    waiting = len(self._chunks) <= index
                    if waiting:
                        ready.clear()
                        self._wakers.append(wake)
                if waiting:
                    await ready.wait()
                while index < len(self._chunks):
                    chunk = self._chunks[index]
                    index += 1
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        finally:
            with self._changed:
                if wake in self._wakers:
                    self._wakers.remove(wake)
            self.cancel()

    async def finished(self) -> None:
        """Wait for the end, for asyncio, without waking up at every token. Leaving early cancels the request."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        with self._changed:
            waiting = not self._chunks or self._chunks[-1].finish_reason is None
            if waiting:
                self._end_wakers.append(wake)
        try:
            if waiting:
                await ready.wait()
        finally:
            self.cancel()

    def publish(self, chunk: Chunk) -> None:
        """Add a chunk. Only the engine calls this."""
        with self._changed:
            self._chunks.append(chunk)
            wakers, self._wakers = self._wakers, []
            if chunk.finish_reason is not None:
                wakers += self._end_wakers
            if self._readers:
                self._changed.notify_all()
        if chunk.finish_reason is not None:
            self._finished.set()
        for wake in wakers:
            try:
                wake()
            except RuntimeError:  # its event loop is closed, so nobody reads any more
                self.cancel()

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
            version=self.version,
            logprobs=logprobs,
            error=last.error,
        )
