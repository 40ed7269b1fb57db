"""A slot without tensors: it answers from a function, token by token, and can be slowed, filled and broken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nightschool.data.chat.render import ensure_template
from nightschool.engine.binding import Binding
from nightschool.engine.host_tier import HostTier
from nightschool.engine.request import Chunk, GenerationRequest, TokenLogprob, Usage
from nightschool.errors import NotLoaded, PromptTooLong, QueueFull
from nightschool.store.versions import VersionMetadata


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; half characters are common."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    ensure_template(fast)
    return fast


def say_hello(prompt: str) -> str:
    return "Hello, wörld!"


@dataclass
class FakeVersion:
    name: str
    id: str

    @property
    def path(self) -> Path:
        return Path("/home/of/somebody/.nightschool/models", self.name.rpartition("/")[2], self.id)

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.id}"

    @property
    def facts(self) -> Any:
        moment = datetime(2025, 12, 2, 11, 54, 36, tzinfo=UTC)
        return VersionMetadata(name=self.name, version=self.id, created_at=moment)


class FakeHandle:
    """Answers the bytes of a text, in the tokens of the byte tokenizer."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, text: str) -> None:
        self.engine, self.request, self.text = engine, request, text
        self.cancelled = False
        self.is_finished = False
        self.kept: list[Chunk] | None = None

    async def finished(self) -> None:
        self.kept = [chunk async for chunk in self._stream()]

    async def stream(self) -> AsyncIterator[Chunk]:
        if self.kept is None:
            async for chunk in self._stream():
                yield chunk
        for chunk in self.kept or ():
            yield chunk

    async def _stream(self) -> AsyncIterator[Chunk]:
        tokenizer = self.engine.tokenizer
        ids = tokenizer(self.text, add_special_tokens=False)["input_ids"][: self.request.params.max_new_tokens]
        sent = ""
        for number, token in enumerate(ids):
            await asyncio.sleep(self.engine.seconds_per_token)
            if self.engine.fails_with is not None:
                raise self.engine.fails_with
            if self.cancelled:
                return
            text = tokenizer.decode(ids[: number + 1])
            text = "" if text.endswith("\ufffd") else text[len(sent) :]
            sent += text
            top = self.request.params.logprobs
            logprobs = None if top is None else (TokenLogprob(token, -0.5, tuple((t, -1.0 - t) for t in range(top))),)
            yield Chunk(text=text, token_ids=(token,), logprobs=logprobs)
        self.is_finished = True
        reason = "length" if len(ids) < len(self.text.encode()) else "stop"
        usage = Usage(len(self.request.prompt_ids), len(ids))
        yield Chunk(finish_reason=reason, usage=usage)

    def cancel(self) -> None:
        if not self.is_finished:
            self.cancelled = True


@dataclass
class FakeEngine:
    tokenizer: Any
    context_tokens: int = 100_000
    answer: Callable[[str], str] = say_hello
    seconds_per_token: float = 0.0
    queue_limit: int = 1000
    closed: bool = False
    fails_with: Exception | None = None
    handles: list[FakeHandle] = field(default_factory=list)
    experts: None = None

    def submit(self, request: GenerationRequest) -> FakeHandle:
        if self.closed:
            raise NotLoaded("This version is drained.")
        if len(request.prompt_ids) + request.params.max_new_tokens > self.context_tokens:
            raise PromptTooLong(len(request.prompt_ids), request.params.max_new_tokens, self.context_tokens)
        if sum(not (h.is_finished or h.cancelled) for h in self.handles) >= self.queue_limit:
            raise QueueFull(f"{self.queue_limit} requests wait. Try again later.", retry_after_seconds=3)
        prompt = self.tokenizer.decode(request.prompt_ids)
        handle = FakeHandle(self, request, self.answer(prompt))
        self.handles.append(handle)
        return handle

    def load(self) -> tuple[int, int]:
        return 0, sum(not (handle.is_finished or handle.cancelled) for handle in self.handles)


@dataclass
class FakeGeneration:
    version: FakeVersion
    engine: FakeEngine
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    # Of those that read a memory in their layers, what they stand on.
    memory: None = None

    @property
    def binding(self) -> Binding:
        return Binding(self.version.ref)

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer


class FakeSlot:
    """Serves whatever stands in `promoted` once it is refreshed."""

    def __init__(self, name: str = "bot", *, promoted: str | None = "20251202_115436", **engine: Any) -> None:
        self.name = name
        self.promoted = promoted
        self.current: FakeGeneration | None = None
        self.engine_settings = engine
        self.may_load = threading.Event()
        self.may_load.set()
        self.fails_with: Exception | None = None
        self.closed = False
        self.merged = False
        self.refreshes = 0
        self.num_bytes = 0
        self.host = HostTier(0)
        self.loading = threading.Event()

    @property
    def is_idle(self) -> bool:
        return self.current is None or self.current.engine.load() == (0, 0)

    def serve(self, version: str) -> FakeSlot:
        engine = FakeEngine(byte_tokenizer(), **self.engine_settings)
        self.current = FakeGeneration(FakeVersion(self.name, version), engine)
        return self

    def refresh(self) -> bool:
        self.refreshes += 1
        self.loading.set()
        assert self.may_load.wait(60)
        if self.fails_with is not None:
            raise self.fails_with
        if self.promoted is None or (self.current is not None and self.current.version.id == self.promoted):
            return False
        before = self.current
        self.serve(self.promoted)
        if before is not None:
            before.engine.closed = True
        return True

    def swap(self, ref: str, *, commit: Callable[[], object]) -> None:
        if self.fails_with is not None:
            raise self.fails_with
        commit()
        before = self.current
        self.promoted = ref.partition("@")[2]
        self.serve(self.promoted)
        if before is not None:
            before.engine.closed = True

    def merge(self, *, merged: bool) -> bool:
        changed, self.merged = merged != self.merged, merged
        return changed

    def close(self, *, drain: bool = False, keep: bool = False) -> None:
        self.closed = True
        if self.current is not None:
            self.current.engine.closed = True
