"""Which facts a memory gate finds for a question that they do not answer: the entries by which a finder misleads.

F  facts    n  questions    half  of an address
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nightschool.data.example import Example, NeededFact
from nightschool.data.memory_examples import FactRanges, question_of
from nightschool.layers.memory_gate import GateFeatures, text_for_gate
from nightschool.models.memory_model import MemoryModel

# So many facts nearest to a question are looked at.
_NEAREST = 12
_TEXTS_AT_ONCE = 512


def nearest_facts(
    model: MemoryModel, tokenizer: Any, ranges: FactRanges, examples: Sequence[Example]
) -> list[tuple[NeededFact, ...]]:
    """Of each example the facts that the gate, as it is now, finds nearest to its question, and that do not answer it.

    Facts whose subject is not known are not looked for.
    """
    facts = [fact for fact in ranges.facts if fact.subject]
    if len(facts) < 2:
        return [()] * len(examples)
    gate, features = model.memory.gate, GateFeatures(cast(Any, model.get_input_embeddings()).weight)
    device = features.device

    def addresses(head: nn.Module, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            ids = [tokenizer(text_for_gate(text), add_special_tokens=False)["input_ids"] or [0] for text in part]
            flat = torch.tensor([token for one in ids for token in one], device=device)
            parts.append(head(*features(flat), [len(one) for one in ids]))
        return torch.cat(parts)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        subjects = addresses(gate.subject, [fact.subject for fact in facts])
        relations = addresses(gate.relation, [fact.relation for fact in facts])
        questions = [question_of(example) for example in examples]
        asked = addresses(gate.subject, questions), addresses(gate.relation, questions)
        found = []
        for start in range(0, len(questions), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            cosines = asked[0][part] @ subjects.T + asked[1][part] @ relations.T
            found += cosines.topk(min(_NEAREST, len(facts)), dim=1).indices.tolist()
    return [
        tuple(
            fact
            for fact in (facts[n] for n in numbers)
            if example.fact is None or fact.statement != example.fact.statement
        )
        for example, numbers in zip(examples, found, strict=True)
    ]
