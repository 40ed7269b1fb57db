"""A model in this process, ready to answer: the same for `chat`, for `eval` and for the gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.handle import Handle
from nightschool.engine.memory_lookup import last_question, open_memory, reading_of
from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.engine.recall import MemoryChoice, Read, Recall, recall, way_of_reading, with_facts
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import PromptTooLong, UsageError
from nightschool.memory.layers import Layer, Layers, Searched, check_overlays
from nightschool.models.adapters import load_adapter
from nightschool.models.dtype import probe_dtype, resolve_device
from nightschool.models.load import LoadedModel, Located, locate
from nightschool.models.quiet import quiet_libraries
from nightschool.store.home import Home
from nightschool.store.names import full_name, memory_path, split_name
from nightschool.store.registry import Version


def serving_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that computes it natively; fp32 elsewhere, as trained."""
    return probe_dtype(device) if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Asked:
    """An answer in the making: what was asked, without entries, what a memory had for it, and the tokens that are answered."""

    handle: Handle
    messages: Sequence[Message]
    found: Recall | None
    prompt_ids: list[int]


class LocalModel:
    """A model, and the engine that answers with it as it would be served: an adapter stays apart from its base if it can.

    `ref` is `name@version` for a version of the registry, else what was asked for; or the place where a model lies. `memory` says
    which memory is read, and how; without it, the one that a version was trained with, in its layers. `experts_resident` experts of a
    mixture are in memory at a time where no `pool` is given, all of them without it.
    """

    def __init__(
        self,
        home: Home,
        ref: str | Located,
        *,
        num_rows: int = 1,
        root: Path | None = None,
        pool: EnginePool | None = None,
        memory: MemoryChoice | None = None,
        experts_resident: int | None = None,
    ) -> None:
        self._choice = memory or MemoryChoice(None)
        self._pool = pool or local_pool(home, num_rows=num_rows, experts_resident=experts_resident)
        with quiet_libraries():
            self._found = ref if isinstance(ref, Located) else locate(ref, home, root)
            self._bound = self._pool.bind(self._found, lambda _: nullcontext())
        self.ref = self._found.ref
        self.engine = self._bound.engine

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer, on the very weights that the engine reads."""
        loaded = self.engine.loaded
        if self._bound.binding.adapter is None:
            return loaded
        if self._bound.memory is not None:
            modules = self.engine.memory_modules(self._bound.binding)
            return replace(loaded, tokenizer=self._bound.tokenizer, ref=self.ref, memory=modules)
        # The engine runs modules of its own, so that an adapter here is none there.
        model = load_adapter(cast(PreTrainedModel, loaded.model), self._found.folder, trainable=False).eval()
        return replace(loaded, model=model, tokenizer=self._bound.tokenizer, ref=self.ref, adapter=True)

    def read(self) -> None:
        """Read all that is needed of the model's folder, which may go away afterwards."""
        _ = self.loaded

    @property
    def bound(self) -> BoundEngine:
        """How the engine is asked for this model."""
        return self._bound

    @property
    def home(self) -> Home:
        """The home that the model's pool stands on."""
        return self._pool.home

    @property
    def memory_name(self) -> str | None:
        """The memory that is read, with its tenant: the one that was chosen, or that of the version; None if none is."""
        if self._choice.read == "off" or self._choice.name is not None:
            return None if self._choice.read == "off" else self._choice.name
        stands_on = self._bound.memory
        if stands_on is None or stands_on.memory is None:
            return None
        tenant, _ = split_name(self.ref.partition("@")[0])
        return full_name(tenant, stands_on.memory)

    @cached_property
    def memory(self) -> Searched | None:
        """The memory of `memory_name`, with the overlays that were chosen over it; None if none is read.

        Raises:
            NotFound: If one of them isn't there.
            UsageError: If a memory is to lie over itself, or over none.
        """
        name, overlays = self.memory_name, self._choice.overlays
        if name is None and overlays and self._choice.read != "off":
            raise UsageError(f"The overlay {overlays[0]!r} lies over no memory. Name one with --memory.")
        if name is None:
            return None
        check_overlays(name, overlays)
        names = (*reversed(overlays), name)
        return Layers(name, [Layer(one, open_memory(memory_path(self._pool.home, one), self._bound)) for one in names])

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together."""
        return self.engine.context_tokens

    def ask(self, request_id: str, messages: Sequence[Message], params: SamplingParams) -> Handle:
        """Queue a conversation.

        Raises:
            PromptTooLong: If it does not fit the context.
        """
        return self.begin(request_id, messages, params).handle

    def begin(
        self, request_id: str, messages: Sequence[Message], params: SamplingParams, *, shorten: bool = False
    ) -> Asked:
        """Queue a conversation, and keep what a memory had for it; with `shorten`, for fewer tokens where the context is nearly full.

        Raises:
            PromptTooLong: If it does not fit the context.
            UsageError: If the memory is to be read in layers that do not read.
            NotFound: If the memory isn't there.
        """
        found = self._recall(messages)
        prompt_ids = self.encode(messages, found)
        if shorten:
            free_tokens = self.context_tokens - len(prompt_ids)
            if free_tokens < 1:
                raise PromptTooLong(len(prompt_ids), 1, self.context_tokens)
            params = replace(params, max_new_tokens=min(params.max_new_tokens, free_tokens))
        return self._submit(request_id, messages, found, prompt_ids, params)

    def encode(self, messages: Sequence[Message], found: Recall | None) -> list[int]:
        """The tokens of a prompt, with the entries that are read there."""
        told = messages if found is None else with_facts(messages, found.in_prompt)
        return render_prompt(self._bound.tokenizer, [part for part in told if isinstance(part, Message)])

    def ask_greedily(self, request_id: str, messages: Sequence[Message], max_new_tokens: int) -> Handle:
        """Queue a conversation, answered by the likeliest tokens, fewer where the context is nearly full.

        Raises:
            PromptTooLong: If the context has no room for one token of an answer.
        """
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0)
        return self.begin(request_id, messages, params, shorten=True).handle

    @property
    def reads(self) -> Read | None:
        """How a memory is read; None if none is.

        Raises:
            NotFound: If the memory isn't there.
            UsageError: If it is to be read in layers that do not read.
        """
        asked = self._choice.read
        return None if asked == "off" or self.memory is None else way_of_reading(self._bound, asked)

    def _recall(self, messages: Sequence[Message]) -> Recall | None:
        reads = self.reads
        return None if reads is None or self.memory is None else recall(self.memory, reads, last_question(messages))

    def _submit(
        self,
        request_id: str,
        messages: Sequence[Message],
        found: Recall | None,
        prompt_ids: list[int],
        params: SamplingParams,
    ) -> Asked:
        binding, reading = self._bound.binding, None
        if found is not None:
            binding = replace(binding, memory_revision=found.label)
            reading = reading_of(found.found) if found.read == "layers" else None
        request = GenerationRequest(request_id, binding, prompt_ids, params, reading=reading)
        return Asked(self.engine.submit(request), messages, found, prompt_ids)

    def count_tokens(self, text: str) -> int:
        """The length of a text in the model's tokens, without special ones."""
        return len(self._bound.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prove(self, version: Version) -> None:
        """Have this model, which is that version, answer what it was published with.

        Raises:
            Conflict: If it answers otherwise.
        """
        self._pool.proofs.prove(self._bound, version)

    def close(self) -> None:
        memory = self.__dict__.get("memory")
        if memory is not None:
            memory.close()
        if self._bound.memory is None and self._bound.binding.adapter is not None and "loaded" in self.__dict__:
            # Others may stand on the base: it is as it was.
            cast(Any, self.loaded.model).unload()
        self._pool.close(self._bound)


def local_pool(home: Home, *, num_rows: int, experts_resident: int | None = None) -> EnginePool:
    """What models of this process stand on; two that are given the same one share their base."""
    device = resolve_device()
    return EnginePool(
        home, device=device, dtype=serving_dtype(device), num_rows=num_rows, experts_resident=experts_resident
    )


@contextmanager
def local_model(
    home: Home,
    ref: str,
    *,
    num_rows: int = 1,
    root: Path | None = None,
    pool: EnginePool | None = None,
    memory: MemoryChoice | None = None,
    experts_resident: int | None = None,
) -> Iterator[LocalModel]:
    """Load a model for the time of a block; a relative folder is taken against `root`."""
    model = LocalModel(
        home, ref, num_rows=num_rows, root=root, pool=pool, memory=memory, experts_resident=experts_resident
    )
    try:
        yield model
    finally:
        model.close()
