"""Why a model that reads a memory said what it said: per token the entries, and what it would have thought without each of them.

The counterfactual is exact: the answer is scored again as it was given, once with everything that was read, once without each of the
entries that a token is ascribed to, and once with the memory off.

Shapes: P tokens of the prompt, A of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nightschool.layers.memory_reading import EntryWeight, MemoryReading, TokenSource
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_step import Trace

# Entries whose absence is tried, the heaviest first; each costs a pass over prompt and answer.
_MOST_TRIED = 8
# Below this share of a token's probability an entry of the prompt is not named.
_LEAST_SHARE = 0.05


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
        return self.source.to_json() | {
            "probability": round(self.probability, 6),
            "without_memory": round(self.without_memory, 6),
            "without": {entry: round(value, 6) for entry, value in self.without.items()},
        }


Run = Callable[[Callable[[], "Scored"]], "Scored"]
# Log-probabilities [A] of an answer's tokens after those of a prompt.
LogProbs = Callable[[Sequence[int], Sequence[int]], Tensor]


class Scored(NamedTuple):
    """Log-probabilities [A] of an answer's tokens, and where each of them came from, if something was read."""

    log_probs: Tensor
    sources: list[TokenSource]


def at_once(score: Callable[[], Scored]) -> Scored:
    """Run a pass here and now."""
    return score()


def explain(
    model: MemoryModel,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    reading: MemoryReading | None,
    run: Run = at_once,
) -> list[TokenWhy]:
    """Score an answer with and without what was read for it in the layers.

    Args:
        model: What answered.
        prompt_ids: P tokens, at least one.
        answer_ids: A tokens that it gave.
        reading: What it read; None or an empty one if nothing was found.
        run: Runs each of the passes, one for each entry and two more; others may take turns between them.

    Returns:
        One for each token of the answer.
    """
    if not answer_ids:
        return []
    alone, _ = run(partial(score, model, prompt_ids, answer_ids))
    if reading is None or not len(reading):
        nothing = TokenSource("weights", (), 0.0)
        return [
            TokenWhy(token, nothing, value, value, {})
            for token, value in zip(answer_ids, alone.exp().tolist(), strict=True)
        ]
    log_probs, sources = run(partial(score, model, prompt_ids, answer_ids, reading))
    heaviest: dict[str, float] = {}
    for source in sources:
        for entry in source.entries:
            heaviest[entry.entry] = max(entry.weight, heaviest.get(entry.entry, 0.0))
    tried = sorted(heaviest, key=lambda entry: -heaviest[entry])[:_MOST_TRIED]
    without = {
        entry: run(partial(score, model, prompt_ids, answer_ids, reading.without(entry))).log_probs.exp().tolist()
        for entry in tried
    }
    columns = zip(answer_ids, sources, log_probs.exp().tolist(), alone.exp().tolist(), strict=True)
    return [
        TokenWhy(token, source, probability, base, {entry: values[place] for entry, values in without.items()})
        for place, (token, source, probability, base) in enumerate(columns)
    ]


def explain_prompt(
    log_probs: LogProbs,
    prompts: Mapping[str | None, Sequence[int]],
    plain_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> list[TokenWhy]:
    """Score an answer with and without each of the entries that stood in its prompt.

    A token is ascribed to an entry by the share of its probability that goes with the entry.

    Args:
        log_probs: Scores an answer after a prompt, by what answered.
        prompts: The prompt as it was under None, and by entry what it would have been without it.
        plain_ids: The prompt without any entry.
        answer_ids: A tokens that it gave.
    """
    if not answer_ids:
        return []
    alone = log_probs(plain_ids, answer_ids).exp().tolist()
    probabilities = log_probs(prompts[None], answer_ids).exp().tolist()
    entries = [entry for entry in prompts if entry is not None][:_MOST_TRIED]
    without = {entry: log_probs(prompts[entry], answer_ids).exp().tolist() for entry in entries}
    found = []
    for place, token in enumerate(answer_ids):
        there = {entry: values[place] for entry, values in without.items()}
        shares = {e: max(0.0, 1 - value / max(probabilities[place], 1e-12)) for e, value in there.items()}
        heavy = sorted((e for e in shares if shares[e] >= _LEAST_SHARE), key=lambda e: -shares[e])
        source = TokenSource(
            "prompt" if heavy else "weights", tuple(EntryWeight(entry, 0, shares[entry]) for entry in heavy), 0.0
        )
        found.append(TokenWhy(token, source, probabilities[place], alone[place], there))
    return found


@torch.no_grad()
def score(
    model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int], reading: MemoryReading | None = None
) -> Scored:
    """What a model, which may read a memory, thinks of each token of an answer that it is given."""
    ids = [*prompt_ids, *answer_ids[:-1]]
    places = list(range(len(prompt_ids) - 1, len(ids)))
    # Only what predicts the answer reads, as when it was given.
    spans = [(slice(places[0], len(ids)), reading)] if reading is not None and len(reading) else []
    device = next(model.parameters()).device
    # Rows of logits beside those that are wanted would take most of the memory.
    settings = {"use_cache": False, "logits_to_keep": torch.tensor(places, device=device)}
    nothing: AbstractContextManager[list[Trace]] = nullcontext([])
    with model.reading(spans, places) if isinstance(model, MemoryModel) else nothing as traces:
        output = model(input_ids=torch.tensor([ids], device=device), **settings)
        answered = torch.tensor(list(answer_ids), device=device)
        log_probs = output.logits[0].float().log_softmax(-1).gather(1, answered[:, None])[:, 0]
        if not traces:
            return Scored(log_probs, [TokenSource("weights", (), 0.0)] * len(answer_ids))
        given = enumerate(zip(answer_ids, log_probs.tolist(), strict=True))
        return Scored(log_probs, [traces[0].source(place, token, value) for place, (token, value) in given])
