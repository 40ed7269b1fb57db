"""From a prompt to an answer: rendering off the event loop, one version per request, cancelled when nobody listens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio.to_thread

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.binding import Binding
from nightschool.engine.handle import Handle
from nightschool.engine.memory_lookup import reading_of
from nightschool.engine.pool import Generation
from nightschool.engine.recall import (
    MemoryChoice,
    Prompt,
    Recall,
    is_token_ids,
    question_in,
    recall,
    way_of_reading,
    with_facts,
)
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.engine.why import reasons, refuse_unknowable
from nightschool.errors import DataError, NotFound, NotLoaded, PromptTooLong, UsageError
from nightschool.models.memory_why import TokenWhy
from nightschool.server.errors import Refusal
from nightschool.server.generation import Running
from nightschool.server.memories.opened import Memories
from nightschool.server.metrics import Metrics
from nightschool.server.served_names import ServedNames
from nightschool.store.principal import Principal

Result = TypeVar("Result")
_PIECE_CHARACTERS = 20_000
_SPLIT_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """What a client wants: `n` answers to each prompt by `model`, or by the first served name without it.

    `max_new_tokens` of None means `default_max_new_tokens`, or less where the context leaves less.
    `owner` is whose model it is where that is another tenant, which lets this one ask it.
    Tenants never share cached prefixes, so that timing tells neither about the other.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    max_new_tokens: int | None
    default_max_new_tokens: int
    model: str | None
    principal: Principal
    n: int = 1
    owner: str | None = None
    memory: MemoryChoice | None = None
    wants_why: bool = False


class Answering:
    """Turns prompts into token ids with the tokenizer of the version that will answer, and submits them to it.

    Args:
        names: What answers.
        metrics: Where requests are counted.
        memories: The home's, if there is one.
        memory: Which memory is read by who names none, and how.
    """

    def __init__(
        self,
        names: ServedNames,
        metrics: Metrics,
        memories: Memories | None = None,
        memory: MemoryChoice | None = None,
    ) -> None:
        self._names = names
        self._metrics = metrics
        self._memories, self._memory = memories, memory
        # A tokenizer is changed by encoding with other truncation settings; one at a time is safe.
        self._encoding = threading.Lock()

    async def why(self, running: Running, ask: Ask, index: int, answer_ids: Sequence[int]) -> list[TokenWhy]:
        """Why answer `index` says what it says.

        Raises:
            NotLoaded: If its version was swapped out meanwhile.
        """
        place = index // ask.n

        def encode(prompt: Prompt) -> list[int]:
            with self._encoding:
                return _encode(running.tokenizer, prompt)

        return await anyio.to_thread.run_sync(
            reasons,
            running.generation,
            running.recalls[place],
            ask.prompts[place],
            running.prompts[place],
            answer_ids,
            encode,
        )

    async def start(self, ask: Ask, request_id: str) -> Running:
        """Begin to generate.

        Raises:
            Refusal: 404 if the model is not served here.
            NotLoaded: If no version of it is loaded.
            PromptTooLong: If a prompt and its answer do not fit the context.
            QueueFull: If too many requests wait.
            UsageError: If a prompt cannot be rendered or has no token.
        """
        generation, binding = await self._names.resolve(ask.model, ask.principal, ask.owner)
        while True:
            try:
                return await anyio.to_thread.run_sync(self._start, generation, binding, ask, request_id)
            except NotLoaded:
                # The version was swapped out while the prompt was rendered; the next one has its own tokenizer.
                before = generation
                generation, binding = await self._names.resolve(ask.model, ask.principal, ask.owner)
                if generation is before:
                    raise

    def _start(self, generation: Generation, binding: Binding, ask: Ask, request_id: str) -> Running:
        tokenizer, context_tokens = generation.tokenizer, generation.engine.context_tokens
        with self._encoding:
            for prompt in ask.prompts:
                _refuse_hopeless(tokenizer, prompt, context_tokens)
        recalls = self._recalls(generation, ask)
        if ask.wants_why:
            for found in recalls:
                refuse_unknowable(found)
        asked = [
            prompt if found is None else with_facts(prompt, found.in_prompt)
            for prompt, found in zip(ask.prompts, recalls, strict=True)
        ]
        with self._encoding:
            prompts = [_encode(tokenizer, prompt) for prompt in asked]
        handles = self._submit(generation, binding, prompts, recalls, ask, request_id)
        return Running(generation, prompts, handles, self._metrics, recalls)

    def _recalls(self, generation: Generation, ask: Ask) -> list[Recall | None]:
        """What a memory has for each prompt; None where none is read.

        A memory that the request itself names must be there. The server's own choice is every tenant's that has such a memory, and
        leaves prompts of token ids, into which no words can be put, as they are.
        """
        nothing: list[Recall | None] = [None] * len(ask.prompts)
        choice = ask.memory or self._memory or MemoryChoice(None)
        own = generation.memory.memory if generation.memory is not None else None
        by_default = self._memory.name if self._memory is not None else None
        name = choice.name or own or by_default
        if choice.read == "off" or (name is None and ask.memory is None):
            return nothing
        if name is None or self._memories is None:
            raise UsageError("No memory is named, and this model was trained with none. Name one in memory.name.")
        read = way_of_reading(generation, choice.read)
        is_by_default = ask.memory is None and self._memory is not None
        if is_by_default and read == "prompt" and any(is_token_ids(prompt) for prompt in ask.prompts):
            return nothing
        try:
            memory = self._memories.asked(ask.principal.tenant, name, generation, choice.overlays)
        except NotFound:
            if is_by_default:
                return nothing
            raise
        return [recall(memory, read, question_in(prompt, generation.tokenizer)) for prompt in ask.prompts]

    def _submit(
        self,
        generation: Generation,
        binding: Binding,
        prompts: list[list[int]],
        recalls: Sequence[Recall | None],
        ask: Ask,
        request_id: str,
    ) -> list[Handle]:
        handles: list[Handle] = []
        try:
            for prompt, found in zip(prompts, recalls, strict=True):
                pinned = binding if found is None else replace(binding, memory_revision=found.label)
                params = _with_length(ask, len(prompt), generation.engine.context_tokens)
                for _ in range(ask.n):
                    index = len(handles)
                    seed = None if params.seed is None else (params.seed + index) % 2**63
                    seeded = replace(params, seed=seed)
                    request = GenerationRequest(
                        f"{request_id}-{index}",
                        pinned,
                        prompt,
                        seeded,
                        reading=reading_of(found.found) if found is not None and found.read == "layers" else None,
                        wants_sources=ask.wants_why,
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
        except DataError as error:
            raise UsageError(str(error)) from None
    if not ids:
        raise UsageError("The prompt has 0 tokens, and an answer needs at least 1. Write something into the prompt.")
    return ids
