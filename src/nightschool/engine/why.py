"""Why a model answered as it did, while it goes on answering others: each pass takes a turn between their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedModel

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.compute import COMPUTE
from nightschool.engine.local_model import LocalModel
from nightschool.engine.memory_lookup import reading_of
from nightschool.engine.pool import BoundEngine
from nightschool.engine.recall import Read, Recall, recall, with_facts
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import NotLoaded, UsageError
from nightschool.layers.memory_reading import MemoryReading
from nightschool.memory.memory import Found, Memory
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_why import TokenWhy, explain, explain_prompt

_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Explained:
    """An answer, what was read for it, and each of its tokens with where it came from."""

    text: str
    recall: Recall
    why: list[TokenWhy]
    tokens: list[str]


def explained_answer(model: LocalModel, memory: Memory, read: Read, question: str, max_new_tokens: int) -> Explained:
    """Ask a model greedily, and why it says what it says.

    Raises:
        UsageError: If it cannot read in that way, or is an adapter, of which why is not told while the prompt is read.
        PromptTooLong: If prompt and answer do not fit the context.
    """
    bound = model.bound
    if read == "layers" and bound.memory is None:
        raise UsageError(
            f"{model.ref} has no layers that read a memory. Read the prompt, or train it with method: memory."
        )
    if read == "prompt" and bound.binding.adapter is not None and bound.memory is None:
        raise UsageError(f"{model.ref} is an adapter, of which why is not told while the prompt is read. Ask its base.")
    found = recall(memory, read, question)
    asked = [Message("user", question)]

    def encode(entries: Sequence[Found]) -> list[int]:
        told = with_facts(asked, entries)
        return render_prompt(bound.tokenizer, [part for part in told if isinstance(part, Message)])

    prompt_ids = encode(found.found if read == "prompt" else ())
    params = SamplingParams(max_new_tokens, temperature=0)
    binding = replace(bound.binding, memory_revision=found.label)
    reading = reading_of(found.found) if read == "layers" else None
    handle = bound.engine.submit(GenerationRequest("why", binding, prompt_ids, params, reading=reading))
    answer = handle.result(_ANSWER_SECONDS)
    if reading is not None:
        why = why_of_layers(bound, prompt_ids, answer.token_ids, reading)
    else:
        prompts: dict[str | None, Sequence[int]] = {None: prompt_ids}
        for one in found.found:
            prompts[one.entry.id] = encode([other for other in found.found if other is not one])
        why = why_of_prompt(bound, prompts, encode(()), answer.token_ids)
    return Explained(answer.text, found, why, [str(bound.tokenizer.decode([token])) for token in answer.token_ids])


def why_of_layers(
    bound: BoundEngine, prompt_ids: Sequence[int], answer_ids: Sequence[int], reading: MemoryReading
) -> list[TokenWhy]:
    """Of an answer whose entries were read by the model's layers.

    Raises:
        NotLoaded: If the model was swapped out meanwhile.
    """
    modules = bound.engine.memory_modules(bound.binding)
    if modules is None:
        raise NotLoaded(f"{bound.binding.label} is no longer served, so it cannot say why. Ask again.")
    # On the weights that the engine reads, but on modules of their own: hooks here are none there.
    model = COMPUTE.call(lambda: MemoryModel(cast(PreTrainedModel, bound.engine.loaded.model), modules))
    try:
        return explain(model, prompt_ids, answer_ids, reading, COMPUTE.call)
    finally:
        COMPUTE.call(model.attachment.remove)


def why_of_prompt(
    bound: BoundEngine,
    prompts: Mapping[str | None, Sequence[int]],
    plain_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> list[TokenWhy]:
    """Of an answer whose entries stood in the prompt; see `models.memory_why.explain_prompt`."""
    return explain_prompt(bound.engine.loaded.model, prompts, plain_ids, answer_ids, COMPUTE.call)
