"""What an engine holds of those whom it answers with, and of each request that it answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from nightschool.engine.answer import Answer
from nightschool.engine.binding import Binding
from nightschool.engine.detokenize import Vocabulary
from nightschool.engine.handle import Handle
from nightschool.engine.sampling import RowSampling
from nightschool.engine.step_context import SpanReading


@dataclass(eq=False)
class Resident:
    """What the engine can answer with: its base alone, or an adapter or memory modules on it, by their numbers in the runner.

    `num_holders` are those who opened it and did not retire it since. One that is not open takes no requests; it still
    answers the `num_active` that it took.
    """

    number: int
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    stop_ids: Collection[int]
    num_bytes: int
    memory: int | None = None
    is_open: bool = True
    num_holders: int = 0
    num_active: int = 0


@dataclass(eq=False)
class Active:
    """A request with everything that its answer needs. `token_ids` are prompt and answer."""

    key: int
    resident: Resident
    handle: Handle
    token_ids: list[int]
    answer: Answer
    sampling: RowSampling

    @property
    def binding(self) -> Binding:
        return self.handle.request.binding

    @property
    def reading(self) -> SpanReading | None:
        """What it reads, and from which token on; None where nothing was found, or nothing can be read.

        Only what predicts the answer reads, so that the prompt's keys and values are those of the base.
        """
        request, memory = self.handle.request, self.resident.memory
        if memory is None or request.reading is None or not len(request.reading):
            return None
        return SpanReading(memory, request.reading, len(request.prompt_ids) - 1)

    @property
    def prefix_binding(self) -> Binding:
        """Whose prefixes it shares: what a memory says is in none of them."""
        return replace(self.binding, memory_revision=None)
