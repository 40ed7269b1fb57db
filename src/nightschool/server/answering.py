"""From a prompt to an answer: rendering off the event loop, one version per request, cancelled when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio.to_thread
from jinja2 import TemplateError
from starlette.types import Receive

from nightschool.data.chat import render_prompt
from nightschool.data.example import Message
from nightschool.engine.request import Chunk, GenerationRequest, SamplingParams
from nightschool.errors import NightschoolError, NotLoaded, PromptTooLong, UsageError
from nightschool.server.errors import ClientGone, Refusal, log
from nightschool.server.metrics import Metrics
from nightschool.server.ports import GenerationPort, HandlePort, SlotPort

Prompt = Sequence[Message] | str | list[int]
Result = TypeVar("Result")
_PIECE_CHARACTERS = 20_000
_SPLIT_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """What a client wants: `n` answers to each prompt.

    `max_new_tokens` of None means `default_max_new_tokens`, or less where the context leaves less.
    Callers with different `cache_salt` never share cached prefixes, so that timing tells neither about the other.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    max_new_tokens: int | None
    default_max_new_tokens: int
    cache_salt: str
    n: int = 1


@dataclass
class Answer:
    """One finished answer; `chunks` hold its tokens in order."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


class Running:
    """The answers in the making of one request, all by the same version."""

    def __init__(
        self, generation: GenerationPort, prompts: list[list[int]], handles: list[HandlePort], metrics: Metrics
    ) -> None:
        self.version = generation.version
        self.tokenizer = generation.engine.loaded.tokenizer
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

    def facts(self) -> dict[str, Any]:
        """What the access log says."""
        return {"version": self.version.ref, "tokens_in": self.prompt_tokens, "tokens_out": self.generated_tokens}

    async def events(self) -> AsyncGenerator[tuple[int, Chunk]]:
        """Every chunk of every answer as it comes, with the index of the answer; cancels what is left at the end."""
        queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, handle, queue)) for i, handle in enumerate(self._handles)]
        open_answers = len(pumps)
        try:
            while open_answers:
                index, item = await queue.get()
                if item is None:
                    open_answers -= 1
                elif isinstance(item, BaseException):
                    raise _failure(item) from item
                else:
                    self._count(item)
                    _refuse_broken(item)
                    yield index, item
        finally:
            self.cancel()
            for pump in pumps:
                pump.cancel()

    async def answers(self) -> list[Answer]:
        """All answers, when all are finished."""
        answers = [Answer() for _ in self._handles]
        async with contextlib.aclosing(self.events()) as events:
            async for index, chunk in events:
                answers[index].chunks.append(chunk)
        return answers

    def _count(self, chunk: Chunk) -> None:
        self.generated_tokens += len(chunk.token_ids)
        self._metrics.generated_tokens.inc(len(chunk.token_ids))
        if chunk.usage is not None:
            self.cached_tokens += chunk.usage.cached_tokens
        if chunk.token_ids and not self._first_seen:
            self._first_seen = True
            self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)


def _refuse_broken(chunk: Chunk) -> None:
    """Raise what ended an answer before its time."""
    if chunk.finish_reason == "error":
        raise Refusal(500, f"Generation failed: {chunk.error}", "generation_failed")
    if chunk.finish_reason == "cancelled":
        message = "The answer was cancelled, because its version is being unloaded. Ask again."
        raise Refusal(503, message, "cancelled", headers={"Retry-After": "1"})


def _failure(error: BaseException) -> BaseException:
    """Our own errors as they are; whatever else broke, in the words of row 000-37."""
    if isinstance(error, NightschoolError | Refusal):
        return error
    log.error("generation failed", exc_info=error)
    return Refusal(500, f"Generation failed: {error}", "generation_failed")


async def _pump(index: int, handle: HandlePort, queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]]) -> None:
    try:
        async for chunk in handle.stream():
            queue.put_nowait((index, chunk))
        queue.put_nowait((index, None))
    except Exception as error:  # it is raised where the queue is read
        queue.put_nowait((index, error))


class Answering:
    """Turns prompts into token ids with the tokenizer of the version that will answer, and submits them to it."""

    def __init__(self, slot: SlotPort, metrics: Metrics) -> None:
        self._slot = slot
        self._metrics = metrics
        # A tokenizer is changed by encoding with other truncation settings; one at a time is safe.
        self._encoding = threading.Lock()

    async def start(self, ask: Ask, request_id: str) -> Running:
        """Begin to generate.

        Raises:
            NotLoaded: If no version is served.
            PromptTooLong: If a prompt and its answer do not fit the context.
            QueueFull: If too many requests wait.
            UsageError: If a prompt cannot be rendered or has no token.
        """
        return await anyio.to_thread.run_sync(self._start, ask, request_id)

    def _start(self, ask: Ask, request_id: str) -> Running:
        while True:
            generation = self._slot.current
            if generation is None:
                raise NotLoaded("No version is served. Train and promote one, or wait until it is loaded.")
            tokenizer, context_tokens = generation.engine.loaded.tokenizer, generation.engine.context_tokens
            with self._encoding:
                for prompt in ask.prompts:
                    _refuse_hopeless(tokenizer, prompt, context_tokens)
                prompts = [_encode(tokenizer, prompt) for prompt in ask.prompts]
            try:
                handles = self._submit(generation, prompts, ask, request_id)
            except NotLoaded:
                # The version was swapped out while the prompt was rendered; the next one has its own tokenizer.
                if self._slot.current is generation:
                    raise
                continue
            return Running(generation, prompts, handles, self._metrics)

    def _submit(
        self, generation: GenerationPort, prompts: list[list[int]], ask: Ask, request_id: str
    ) -> list[HandlePort]:
        handles: list[HandlePort] = []
        try:
            for prompt in prompts:
                params = _with_length(ask, len(prompt), generation.engine.context_tokens)
                for _ in range(ask.n):
                    index = len(handles)
                    seed = None if params.seed is None else (params.seed + index) % 2**63
                    request = GenerationRequest(
                        f"{request_id}-{index}", prompt, replace(params, seed=seed), ask.cache_salt
                    )
                    handles.append(generation.engine.submit(request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles


def _with_length(ask: Ask, prompt_tokens: int, context_tokens: int) -> SamplingParams:
    """The parameters with a length: as asked, or else what fits."""
    wanted = ask.max_new_tokens
    if wanted is None:
        room = context_tokens - prompt_tokens
        if room < 1:
            raise PromptTooLong(prompt_tokens, 1, context_tokens)
        wanted = min(ask.default_max_new_tokens, room)
    return replace(ask.params, max_new_tokens=wanted)


def _refuse_hopeless(tokenizer: Any, prompt: Prompt, context_tokens: int) -> None:
    """Refuse a prompt that is far too long as soon as its beginning fills the context.

    Rendering megabytes takes seconds, and lists of a million tokens are made without letting anybody else run
    (measured: 1 s for 600 kB). Counting piece by piece leaves the interpreter to others, and stops early.
    """
    texts = [prompt] if isinstance(prompt, str) else [part.content for part in prompt if isinstance(part, Message)]
    if not tokenizer.is_fast or sum(map(len, texts)) <= _PIECE_CHARACTERS:
        return
    tokens = 0
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            # A cut may split a token into a few; they are not held against the prompt.
            [encoding] = tokenizer.backend_tokenizer.encode_batch([piece], add_special_tokens=False)
            tokens += max(0, len(encoding) - _SPLIT_TOKENS)
            if tokens >= context_tokens:
                raise Refusal(
                    400,
                    f"The prompt has at least {tokens} tokens, and the context of this model holds {context_tokens}, "
                    "prompt and answer together. Shorten the prompt.",
                    "context_length_exceeded",
                )


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a conversation, a text or token ids, which must be in the vocabulary."""
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    elif all(isinstance(part, int) for part in prompt):
        ids = [part for part in prompt if isinstance(part, int)]
        if ids and max(ids) >= len(tokenizer):
            raise UsageError(
                f"The prompt has the token id {max(ids)}, and the vocabulary has {len(tokenizer)} tokens. "
                "Use the tokenizer of this model."
            )
    else:
        try:
            ids = render_prompt(tokenizer, [part for part in prompt if isinstance(part, Message)])
        except TemplateError as error:
            raise UsageError(
                f"The chat template of this model refuses the conversation: {error}. Change the order of its roles."
            ) from None
    if not ids:
        raise UsageError("The prompt has 0 tokens, and an answer needs at least 1. Write something into the prompt.")
    return ids


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


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
