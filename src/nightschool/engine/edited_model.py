"""A model beside a memory that edits are written into, as `evaluation.editing` asks it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.handle import Handle
from nightschool.engine.local_model import LocalModel
from nightschool.engine.memory_lookup import open_memory, reading_of
from nightschool.engine.recall import Prompt, Read, Recall, recall, way_of_reading, with_facts
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import NightschoolError, PromptTooLong
from nightschool.evaluation.editing import Said
from nightschool.evaluation.editing_cases import is_question
from nightschool.memory.layers import Layer, Layers, Searched
from nightschool.memory.store import MemoryStore

_ASKED_AT_ONCE = 64


class EditedModel:
    """Answers greedily, in the engine that serves it.

    `memory` is what it reads, and `read` how; without a memory it is the base that says everything.
    """

    def __init__(self, model: LocalModel, memory: Searched | None, read: Read, max_new_tokens: int) -> None:
        self._model, self._memory, self._read = model, memory, read
        self._params = SamplingParams(max_new_tokens, temperature=0)

    def say(self, prompts: Sequence[str], *, reads: bool) -> list[Said]:
        """What it answers: with its memory as it is now, or without one.

        Raises:
            PromptTooLong: If a prompt and its answer do not fit the context.
            NightschoolError: If an answer could not be generated.
        """
        said: list[Said] = []
        for start in range(0, len(prompts), _ASKED_AT_ONCE):
            asked = [self._asked(prompt, reads=reads) for prompt in prompts[start : start + _ASKED_AT_ONCE]]
            for prompt, (handle, read) in zip(prompts[start:], asked, strict=False):
                answer = handle.result()
                if answer.finish_reason == "error":
                    raise NightschoolError(f"{self._model.ref} failed at {prompt[:80]!r}: {answer.error}. Try again.")
                said.append(Said(answer.text, read))
        return said

    def _asked(self, prompt: str, *, reads: bool) -> tuple[Handle, bool]:
        bound = self._model.bound
        found = recall(self._memory, self._read, prompt) if reads and self._memory is not None else None
        ids = self._encoded(prompt, found)
        if len(ids) + self._params.max_new_tokens > self._model.context_tokens:
            raise PromptTooLong(len(ids), self._params.max_new_tokens, self._model.context_tokens)
        binding, reading = bound.binding, None
        if found is not None:
            binding = replace(binding, memory_revision=found.label)
            reading = reading_of(found.found) if self._read == "layers" else None
        handle = bound.engine.submit(GenerationRequest("editing", binding, ids, self._params, reading=reading))
        return handle, found is not None and bool(found.found)

    def _encoded(self, prompt: str, found: Recall | None) -> list[int]:
        """A question as a turn of a chat, and any other prompt as a text that goes on."""
        tokenizer = self._model.bound.tokenizer
        asked: Prompt = [Message("user", prompt)] if is_question(prompt) else prompt
        if found is not None:
            asked = with_facts(asked, found.in_prompt)
        if isinstance(asked, str):
            return list(tokenizer(asked)["input_ids"])
        return render_prompt(tokenizer, [part for part in asked if isinstance(part, Message)])


@contextmanager
def edited_model(
    model: LocalModel, folder: Path | None, read: Read | None, max_new_tokens: int
) -> Iterator[tuple[EditedModel, MemoryStore, Read]]:
    """A model beside a memory for edits alone, which is gone at the end; nothing is written into the memory that it lies over.

    Args:
        model: What is asked.
        folder: Of the memory that the edits lie over; None lets them stand alone.
        read: How it reads; None is through its layers where it has such.
        max_new_tokens: Longest answer in tokens.

    Raises:
        UsageError: If it has no layers that read, and they are to.
        NotFound: If there is no such memory.
    """
    way = way_of_reading(model.bound, read)
    under = None if folder is None else open_memory(folder, model.bound)
    try:
        with TemporaryDirectory(prefix="nightschool-editing-") as scratch:
            MemoryStore.create(Path(scratch) / "edits").close()
            memory = open_memory(Path(scratch) / "edits", model.bound)
            layers = [Layer(memory.name, memory)]
            if under is not None:
                # As a session's memory lies over its tenant's.
                layers.append(Layer(under.name, under))
            try:
                yield EditedModel(model, Layers(memory.name, layers), way, max_new_tokens), memory.store, way
            finally:
                memory.close()
    finally:
        if under is not None:
            under.close()
