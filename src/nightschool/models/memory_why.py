"""Why a model that reads a memory said what it said: per token the entries, and what it would have thought without each of them.

The counterfactual is exact: the answer is scored again as it was given, once with everything that was read, once without each of the
entries that a token is ascribed to, and once with the memory off.

Shapes: P tokens of the prompt, A of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.layers.memory_reading import MemoryReading, TokenSource
from nightschool.models.memory_model import MemoryModel

# Entries whose absence is tried, the heaviest first; each costs a pass over prompt and answer.
_MOST_TRIED = 8


@dataclass(frozen=True)
class TokenWhy:
    """One token of an answer. Probabilities are of this token, after the tokens that were really before it.

    `probability` is with all that was read, `without_memory` is the base's alone, and `without` has by entry what it would have been
    if that entry were not there, for the entries that some token of the answer is ascribed to.
    """

    token_id: int
    source: TokenSource
    probability: float
    without_memory: float
    without: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the text of the token is for who has the tokenizer."""
        return {
            "from": self.source.kind,
            "copied": round(self.source.copied, 6),
            "entries": [{"id": entry.entry, "weight": round(entry.weight, 6)} for entry in self.source.entries],
            "probability": round(self.probability, 6),
            "without_memory": round(self.without_memory, 6),
            "without": {entry: round(value, 6) for entry, value in self.without.items()},
        }


@torch.no_grad()
def explain(
    model: MemoryModel, prompt_ids: Sequence[int], answer_ids: Sequence[int], reading: MemoryReading | None
) -> list[TokenWhy]:
    """Score an answer with and without what was read for it.

    Args:
        model: What answered.
        prompt_ids: P tokens, at least one.
        answer_ids: A tokens that it gave.
        reading: What it read; None or an empty one if nothing was found.

    Returns:
        One for each token of the answer.
    """
    if not answer_ids:
        return []
    alone, _ = _scored(model, prompt_ids, answer_ids, None)
    if reading is None or not len(reading):
        nothing = TokenSource("weights", (), 0.0)
        return [
            TokenWhy(token, nothing, value, value, {})
            for token, value in zip(answer_ids, alone.exp().tolist(), strict=True)
        ]
    log_probs, sources = _scored(model, prompt_ids, answer_ids, reading)
    heaviest: dict[str, float] = {}
    for source in sources:
        for entry in source.entries:
            heaviest[entry.entry] = max(entry.weight, heaviest.get(entry.entry, 0.0))
    tried = sorted(heaviest, key=lambda entry: -heaviest[entry])[:_MOST_TRIED]
    without = {
        entry: _scored(model, prompt_ids, answer_ids, reading.without(entry))[0].exp().tolist() for entry in tried
    }
    columns = zip(answer_ids, sources, log_probs.exp().tolist(), alone.exp().tolist(), strict=True)
    return [
        TokenWhy(token, source, probability, base, {entry: values[place] for entry, values in without.items()})
        for place, (token, source, probability, base) in enumerate(columns)
    ]


def _scored(
    model: MemoryModel, prompt_ids: Sequence[int], answer_ids: Sequence[int], reading: MemoryReading | None
) -> tuple[Tensor, list[TokenSource]]:
    """Log-probabilities [A] of the answer, and where each of its tokens came from."""
    ids = [*prompt_ids, *answer_ids[:-1]]
    places = range(len(prompt_ids) - 1, len(ids))
    spans = [(slice(0, len(ids)), reading)] if reading is not None and len(reading) else []
    device = next(model.parameters()).device
    wanted = torch.tensor(list(places), device=device)
    with model.reading(spans, list(places)) as traces:
        output = model(input_ids=torch.tensor([ids], device=device), use_cache=False, logits_to_keep=wanted)
        answered = torch.tensor(list(answer_ids), device=device)
        log_probs = output.logits[0].float().log_softmax(-1).gather(1, answered[:, None])[:, 0]
        if not traces:
            return log_probs, []
        values = log_probs.tolist()
        return log_probs, [
            traces[0].source(place, token, value)
            for place, token, value in zip(places, answer_ids, values, strict=True)
        ]
