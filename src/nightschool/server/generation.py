"""Answers in the making: their chunks as they come, or all of them at the end; cancelled when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from nightschool.engine.handle import Handle
from nightschool.engine.pool import Generation
from nightschool.engine.recall import Recall
from nightschool.engine.request import Chunk
from nightschool.errors import NightschoolError
from nightschool.server.errors import ClientGone, Refusal, log
from nightschool.server.metrics import Metrics

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """One finished answer; `chunks` hold its tokens in order."""

    chunks: list[Chunk]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


class Running:
    """The answers in the making of one request, all by the same version."""

    def __init__(
        self,
        generation: Generation,
        prompts: list[list[int]],
        handles: list[Handle],
        metrics: Metrics,
        recalls: Sequence[Recall | None] = (),
    ) -> None:
        self.version = generation.version
        self.binding = generation.binding
        self.tokenizer = generation.tokenizer
        self.generation, self.prompts = generation, prompts
        self.recalls = [found for found in recalls if found is not None]
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.cached_tokens = 0
        self.generated_tokens = 0
        self._handles = handles
        self._metrics = metrics
        self._started = time.perf_counter()
        self._first_seen = False
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def cancel(self) -> None:
        """Stop generating; finished answers are not touched."""
        for handle in self._handles:
            handle.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": min(self.cached_tokens, self.prompt_tokens)},
        }

    def headers(self) -> dict[str, str]:
        """What answered: the version, and the memory with the revision that was read."""
        read = dict.fromkeys(found.label for found in self.recalls)
        return {"x-model-version": self.binding.label} | ({"x-memory-revision": ",".join(read)} if read else {})

    def facts(self) -> dict[str, Any]:
        """What the access log says."""
        return {"version": self.binding.label, "tokens_in": self.prompt_tokens, "tokens_out": self.generated_tokens}

    async def events(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Every chunk of every answer as it comes, with the index of the answer; cancels what is left at the end."""
        try:
            async with contextlib.aclosing(_merged(self._handles)) as chunks:
                async for index, chunk in chunks:
                    self._count(chunk)
                    if chunk.token_ids and not self._first_seen:
                        self._first_seen = True
                        self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)
                    _refuse_broken(chunk)
                    yield index, chunk
        except Exception as error:
            raise _failure(error) from error
        finally:
            self.cancel()

    async def answers(self) -> list[Answer]:
        """All answers, when all are finished; until then nothing wakes up, which leaves the time to the engine."""
        answers = []
        try:
            for handle in self._handles:
                await handle.finished()
                answers.append(Answer([chunk async for chunk in handle.stream()]))
        except Exception as error:
            raise _failure(error) from error
        finally:
            self.cancel()
        for chunk in (chunk for answer in answers for chunk in answer.chunks):
            self._count(chunk)
            _refuse_broken(chunk)
        return answers

    def _count(self, chunk: Chunk) -> None:
        self.generated_tokens += len(chunk.token_ids)
        self._metrics.generated_tokens.inc(len(chunk.token_ids))
        if chunk.usage is not None:
            self.cached_tokens += chunk.usage.cached_tokens


def _refuse_broken(chunk: Chunk) -> None:
    """Raise what ended an answer before its time."""
    if chunk.finish_reason == "error":
        raise Refusal(500, f"Generation failed: {chunk.error}", "generation_failed")
    if chunk.finish_reason == "cancelled":
        message = "The answer was cancelled, because its version is being unloaded. Ask again."
        raise Refusal(503, message, "cancelled", headers={"Retry-After": "1"})


def _failure(error: Exception) -> Exception:
    """Our own errors as they are; whatever else broke, in the words of row 000-37."""
    if isinstance(error, NightschoolError | Refusal):
        return error
    log.error("generation failed", exc_info=error)
    return Refusal(500, f"Generation failed: {error}", "generation_failed")


async def _merged(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several answers as they come, with the index of the answer."""
    if len(handles) == 1:
        async for chunk in handles[0].stream():
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(index, handle, queue)) for index, handle in enumerate(handles)]
    open_answers = len(pumps)
    try:
        while open_answers:
            index, item = await queue.get()
            if item is None:
                open_answers -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(index: int, handle: Handle, queue: asyncio.Queue[tuple[int, Chunk | Exception | None]]) -> None:
    try:
        async for chunk in handle.stream():
            queue.put_nowait((index, chunk))
        queue.put_nowait((index, None))
    except Exception as error:  # it is raised where the queue is read
        queue.put_nowait((index, error))


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientGone: If it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(working, watching, return_exceptions=True)


async def only_answer(running: Running, request: Request) -> Answer:
    """The one answer in the making for a request, which gets its facts for the log; nothing is computed on once the client goes away.

    Raises:
        ClientGone: If it did.
    """
    try:
        [answer] = await while_connected(request.receive, running.answers())
    finally:
        running.cancel()
        request.state.facts = running.facts()
    return answer


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
