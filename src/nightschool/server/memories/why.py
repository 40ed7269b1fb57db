"""Why an answer says what it says, for a client that asks: `why: true`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nightschool.engine.memory_lookup import reading_of
from nightschool.engine.pool import BoundEngine
from nightschool.engine.recall import Prompt, Recall, with_facts
from nightschool.engine.why import why_of_layers, why_of_prompt
from nightschool.errors import UsageError
from nightschool.models.memory_why import TokenWhy

Encode = Callable[[Prompt], list[int]]


def refuse_unknowable(bound: BoundEngine, found: Recall | None) -> None:
    """Refuse to say why before anything is generated. Raises UsageError with the reason."""
    if found is None:
        raise UsageError("why is told of answers that read a memory, and this one reads none. Name one in memory.name.")
    if found.read == "prompt" and bound.binding.adapter is not None and bound.memory is None:
        raise UsageError(
            f"{bound.binding.label} is an adapter, of which why is not told while memory.read is prompt. Ask its base, or leave why out."
        )


def explained(
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
    """
    if found.read == "layers":
        return why_of_layers(bound, prompt_ids, answer_ids, reading_of(found.found))
    prompts: dict[str | None, Sequence[int]] = {None: prompt_ids}
    for one in found.found:
        others = replace(found, found=tuple(other for other in found.found if other is not one))
        prompts[one.entry.id] = encode(with_facts(prompt, others.found))
    return why_of_prompt(bound, prompts, encode(prompt), answer_ids)


def shown(why: Sequence[TokenWhy], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """As a client gets it."""
    return [{"token": text_of(one.token_id)} | one.to_json() for one in why]
