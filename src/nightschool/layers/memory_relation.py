"""Whether what an entry tells of its subject is what a question asks of it: told from what the base makes of both.

Other words for the same are far from each other as embeddings, but a base that understands both comes to expect the same: after
"Ada owns" and after "Name the beast of Ada" it is in much the same state. So the states of the question's tokens, of the last most, are
compared with those of the entry's tokens before its value: how the base stood when the value was to come. Tokens of the
subject are left out, which are the same in both.

Shapes: n texts of L places that tell, padded; H width of the model, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

ASKED_TOKENS = 64
"""So many of a question's last tokens are looked at: the rest of a long message is not taken through the base a second time."""

# Before training a place counts e^-0.3 as much as the one after it.
_RECENCY = 0.3
_SCALE = 7.4
# States that are no more alike than cosine 0.54 are of different relations, before training.
_BIAS = -4.0
_EPSILON = 1e-6


class Told(NamedTuple):
    """States at the places that tell a relation [n, L, H], and how far each lies before the last [n, L], inf where nothing is."""

    states: Tensor
    age: Tensor

    @classmethod
    def of(cls, states: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Told:
        """States [tokens, H] of at least one text, and which tokens of it tell."""
        kept = [own[list(at)].float() for own, at in zip(states, places, strict=True)]
        ages = [torch.tensor([float(at[-1] - place) for place in at], device=states[0].device) for at in places]
        return cls(
            nn.utils.rnn.pad_sequence(kept, batch_first=True),
            nn.utils.rnn.pad_sequence(ages, batch_first=True, padding_value=math.inf),
        )


def places_asked(question: Sequence[int], subject: Sequence[int]) -> list[int]:
    """Where a question, as tokens, says something beside its subject; its last place at least."""
    name, last = set(subject), len(question) - 1
    return [place for place, token in enumerate(question) if token not in name or place == last]


def places_told(entry: Sequence[int], subject: Sequence[int], told: int) -> list[int]:
    """The same of the first `told` tokens of an entry, those before its value; of all of them where there are none."""
    return places_asked(entry[:told] or entry, subject)


class RelationFit(nn.Module):
    """Log-odds that entries tell what questions ask."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.asked = _Side(hidden_size, rank or hidden_size)
        self.told = _Side(hidden_size, rank or hidden_size)
        self.log_scale = nn.Parameter(torch.tensor(_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(_BIAS))

    def forward(self, questions: Told, entries: Told) -> Tensor:
        """Each question with each entry, in fp32: [questions, entries]."""
        cosines: Tensor = self.asked(questions) @ self.told(entries).T
        return cosines * self.log_scale.exp() + self.bias


class _Side(nn.Module):
    """What the states of a text say of its relation, as a unit vector."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(hidden_size))
        self.attention = nn.Parameter(torch.zeros(hidden_size))
        self.log_recency = nn.Parameter(torch.tensor(_RECENCY).log())
        self.a = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size))
        self.b = nn.Parameter(torch.zeros(hidden_size, rank))

    def forward(self, told: Told) -> Tensor:
        """[n, H]."""
        states = F.rms_norm(told.states, told.states.shape[-1:]) + self.center
        nothing = told.age.isinf()
        logits = states @ self.attention - told.age.masked_fill(nothing, 0) * self.log_recency.exp()
        weights = logits.masked_fill(nothing, -torch.inf).softmax(1)
        pooled = torch.einsum("nl,nlh->nh", weights, states)
        return F.normalize(pooled + F.linear(F.linear(pooled, self.a), self.b), dim=-1, eps=_EPSILON)
