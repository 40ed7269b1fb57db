"""Why a model answered as it did, while it goes on answering others: each pass takes a turn between their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedModel

from nightschool.engine.compute import COMPUTE
from nightschool.engine.pool import BoundEngine
from nightschool.errors import NotLoaded
from nightschool.layers.memory_reading import MemoryReading
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_why import TokenWhy, explain, explain_prompt


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
