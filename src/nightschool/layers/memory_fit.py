"""Whether a found entry fits the question: told from the tokens of both, whatever score it was found with.

A score compares a whole question with a whole address, and is high for whoever is called much the same. Here each token of an
entry's subject looks for its match in the question (late interaction; Khattab & Zaharia 2020, arXiv 2004.12832), so that one
word that is missing is seen. What speaks against an entry: words of its subject that the question lacks; a name in the question
that goes on beside the subject ("Miss Wales" is not Wales); a relation that is meant otherwise.

Shapes: n questions of Q tokens, e entries whose subjects have S and whose relations have R tokens, H width of the base's embedding,
r rank. Texts are padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.memory_gate import GateFeatures

# Weights of the four signs and the bias before training: an entry that lacks nothing fits, one that lacks a word does not.
_MISSING, _WORST, _BESIDE, _RELATION = 6.0, 6.0, 6.0, 4.0
_BIAS = 0.0
# Cosine of a token with itself, up to rounding.
_SAME_TOKEN = 0.99
# A token beside the subject says, before training, that the name goes on with this log-odds.
_NAME_GOES_ON = -1.0
# What it counts before training that a token is another one, however near (1 and 2 are near, and other years): its inverse softplus.
_ANOTHER = -2.0
_EPSILON = 1e-6


class PaddedTexts(NamedTuple):
    """Texts as the fit sees them: features [n, L, H], which places are tokens [n, L], logarithms of the priors [n, L]."""

    features: Tensor
    is_token: Tensor
    log_priors: Tensor

    @classmethod
    def of(cls, features: GateFeatures, texts: Sequence[Sequence[int]], device: torch.device | str) -> PaddedTexts:
        """Token ids of at least one text."""
        longest = max(1, *(len(text) for text in texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        is_token = torch.zeros(len(texts), longest, dtype=torch.bool)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.tensor(list(text), dtype=torch.int64)
            is_token[number, : len(text)] = True
        ids, is_token = ids.to(device), is_token.to(device)
        of_tokens, log_priors = features(ids.flatten())
        of_tokens = of_tokens.view(*ids.shape, -1) * is_token[..., None]
        return cls(of_tokens, is_token, log_priors.view(ids.shape))


class EntryFit(nn.Module):
    """Log-odds that entries fit questions."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        rank = rank or hidden_size
        self.of_subject = nn.Parameter(torch.zeros(hidden_size))
        self.another = nn.Parameter(torch.zeros(hidden_size))
        self.goes_on = nn.Parameter(torch.zeros(hidden_size))
        self.of_relation = nn.Parameter(torch.zeros(hidden_size))
        self.of_question = nn.Parameter(torch.zeros(hidden_size))
        self.a = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size))
        self.b = nn.Parameter(torch.zeros(hidden_size, rank))
        self.log_weights = nn.Parameter(torch.tensor([_MISSING, _WORST, _BESIDE, _RELATION]).log())
        self.bias = nn.Parameter(torch.tensor(_BIAS))

    def forward(self, questions: PaddedTexts, subjects: PaddedTexts, relations: PaddedTexts) -> Tensor:
        """[n, e], in fp32."""
        asked = questions.is_token
        cosines = torch.einsum("nqh,esh->nesq", questions.features, subjects.features)
        there = cosines.masked_fill(~asked[:, None, None, :], -1.0)
        nearest = there.amax(3)
        another = F.softplus(subjects.features @ self.another + _ANOTHER) * (nearest <= _SAME_TOKEN)
        missing = (1 - nearest + another) * subjects.is_token
        share = (subjects.features @ self.of_subject + subjects.log_priors).masked_fill(~subjects.is_token, -torch.inf)
        weights = share.softmax(1).nan_to_num()
        named = (there.masked_fill(~subjects.is_token[None, :, :, None], -1.0).amax(2) > _SAME_TOKEN) & asked[:, None]
        signs = torch.stack(
            [
                -(missing * weights).sum(2),
                -missing.amax(2),
                -self._goes_on(questions, subjects, relations, named),
                self._alike(questions, relations, named),
            ],
            dim=-1,
        )
        return signs @ self.log_weights.exp() + self.bias

    def _goes_on(
        self, questions: PaddedTexts, subjects: PaddedTexts, relations: PaddedTexts, named_neq: Tensor
    ) -> Tensor:
        """How surely a word beside the subject, which the entry lacks, belongs to the name: [n, e]."""
        nothing = torch.zeros_like(named_neq[..., :1])
        near = torch.cat([named_neq[..., 1:], nothing], 2) | torch.cat([nothing, named_neq[..., :-1]], 2)
        beside = near & ~named_neq & questions.is_token[:, None]
        known = torch.cat([subjects.features, relations.features], 1)
        is_token = torch.cat([subjects.is_token, relations.is_token], 1)
        cosines = torch.einsum("nqh,esh->neqs", questions.features, known).masked_fill(~is_token[None, :, None], -1.0)
        lacks = 1 - cosines.amax(3)
        belongs = torch.sigmoid(questions.features @ self.goes_on + _NAME_GOES_ON)
        return (belongs[:, None] * lacks * beside).amax(2)

    def _alike(self, questions: PaddedTexts, relations: PaddedTexts, named_neq: Tensor) -> Tensor:
        """Cosines [n, e] of what the question says beside the subject, and of the relation."""
        rest = questions.is_token[:, None] & ~named_neq
        logits = (questions.features @ self.of_question + questions.log_priors)[:, None].masked_fill(~rest, -torch.inf)
        asked = torch.einsum("neq,nqh->neh", logits.softmax(2).nan_to_num(), questions.features)
        logits = relations.features @ self.of_relation + relations.log_priors
        weights = logits.masked_fill(~relations.is_token, -torch.inf).softmax(1).nan_to_num()
        meant = torch.einsum("er,erh->eh", weights, relations.features)
        return (self._meaning(asked) * self._meaning(meant)).sum(-1)

    def _meaning(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled + F.linear(F.linear(pooled, self.a), self.b), dim=-1, eps=_EPSILON)
