"""Why a model answered as it did, while it goes on answering others: each pass takes a turn between their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from transformers import PreTrainedModel

from nightschool.data.example import Message
from nightschool.engine.compute import COMPUTE
from nightschool.engine.local_model import Asked, LocalModel
from nightschool.engine.memory_lookup import reading_of
from nightschool.engine.pool import BoundEngine
from nightschool.engine.recall import Prompt, Recall, with_facts
from nightschool.engine.request import SamplingParams
from nightschool.errors import NotLoaded, UsageError
from nightschool.layers.memory_reading import MemoryReading
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_why import TokenWhy, explain, explain_prompt

_ANSWER_SECONDS = 600.0

Encode = Callable[[Prompt], list[int]]


@dataclass(frozen=True)
class Explained:
    """What a model answered, what was read for it, and each of its tokens with where it came from, as `shown` shows them."""

    model: str
    question: str
    text: str
    recall: Recall
    why: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.text,
            "memory": self.recall.to_json(),
            "why": self.why,
        }


def refuse_unknowable(found: Recall | None) -> None:
    """Refuse to say why before anything is generated. Raises UsageError with the reason."""
    if found is None:
        raise UsageError("why is told of answers that read a memory, and this one reads none. Name one in memory.name.")


def explained_answer(model: LocalModel, question: str, max_new_tokens: int) -> Explained:
    """Ask a model greedily, and why it says what it says.

    Raises:
        UsageError: If it reads no memory, or cannot read in the way that is wanted.
        PromptTooLong: If prompt and answer do not fit the context.
    """
    asked = model.begin("why", [Message("user", question)], SamplingParams(max_new_tokens, temperature=0))
    answer = asked.handle.result(_ANSWER_SECONDS)
    why = reasons_of(model, asked, answer.token_ids)
    assert asked.found is not None, "it was refused otherwise"
    return Explained(model.ref, question, answer.text, asked.found, why)


def reasons_of(model: LocalModel, asked: Asked, answer_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Why a model here said what it said, as `shown` shows it.

    Raises:
        UsageError: If the answer read no memory.
    """
    bound, found = model.bound, asked.found
    refuse_unknowable(found)
    assert found is not None, "it was refused otherwise"

    def encode(prompt: Prompt) -> list[int]:
        return model.encode([part for part in prompt if isinstance(part, Message)], None)

    why = reasons(bound, found, asked.messages, asked.prompt_ids, answer_ids, encode)
    return shown(why, lambda token: str(bound.tokenizer.decode([token])))


def reasons(
    bound: BoundEngine, found: Recall, prompt: Prompt, prompt_ids: list[int], answer_ids: Sequence[int], encode: Encode
) -> list[TokenWhy]:
    """Each token of an answer with what it was read from, and its probability without that. Blocks while it is computed.

    Args:
        bound: What answered.
        found: What it read.
        prompt: What was asked, without entries.
        prompt_ids: The tokens that were answered.
        answer_ids: The answer.
        encode: Turns a prompt into tokens.

    Raises:
        NotLoaded: If the model was swapped out meanwhile.
    """
    if found.read == "layers":
        return _of_layers(bound, prompt_ids, answer_ids, reading_of(found.found))
    prompts: dict[str | None, Sequence[int]] = {None: prompt_ids}
    for one in found.found:
        prompts[one.id] = encode(with_facts(prompt, [other for other in found.found if other is not one]))
    return explain_prompt(partial(bound.engine.log_probs, bound.binding), prompts, encode(prompt), answer_ids)


def shown(why: Sequence[TokenWhy], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """As people and clients get it."""
    return [{"token": text_of(one.token_id)} | one.to_json() for one in why]


def _of_layers(
    bound: BoundEngine, prompt_ids: Sequence[int], answer_ids: Sequence[int], reading: MemoryReading
) -> list[TokenWhy]:
    modules = bound.engine.memory_modules(bound.binding)
    if modules is None:
        raise NotLoaded(f"{bound.binding.label} is no longer served, so it cannot say why. Ask again.")
    # On the weights that the engine reads, but on modules of their own: hooks here are none there.
    model = COMPUTE.call(lambda: MemoryModel(cast(PreTrainedModel, bound.engine.loaded.model), modules))
    try:
        return explain(model, prompt_ids, answer_ids, reading, COMPUTE.call)
    finally:
        COMPUTE.call(model.attachment.remove)
