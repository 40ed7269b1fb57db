"""Whether a found entry is about what a question names: told from the tokens of both, whatever score it was found with.

A score compares a whole question with a whole address, and is high for whoever is called much the same. Here each token of an
entry's subject looks for its match in the question (late interaction; Khattab & Zaharia 2020, arXiv 2004.12832), so that one
word that is missing is seen. What speaks against an entry: words of its subject that the question lacks, or has in another order
("IBM 9370" is not IBM 3790); a name in the question that goes on beside the subject ("Miss Wales" is not Wales). What the question
asks of it is told by `memory_relation`.

Shapes: n questions of Q tokens, e entries whose subjects have S and whose relations have R tokens, H width of the base's embedding.
Texts are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.memory_gate import GateFeatures
from nightschool.layers.memory_reading import padded_ids

# Weights of the four signs and the bias before training: an entry that lacks nothing fits, one that lacks a word does not.
_MISSING, _WORST, _BESIDE, _BROKEN = 6.0, 6.0, 6.0, 6.0
_BIAS = 4.0
# Cosine of a token with itself, up to rounding.
_SAME_TOKEN = 0.99
# A token beside the subject says, before training, that the name goes on with this log-odds.
_NAME_GOES_ON = -1.0
# What it counts before training that a token is another one, however near (1 and 2 are near, and other years): its inverse softplus.
_ANOTHER = -2.0
# Features are unit vectors of hundreds of numbers, so what is learned of them in a few hundred steps is multiplied.
_STEEP = 10.0


class PaddedTexts(NamedTuple):
    """Texts as the fit sees them: features [n, L, H], which places are tokens [n, L], logarithms of the priors [n, L]."""

    features: Tensor
    is_token: Tensor
    log_priors: Tensor

    @classmethod
    def of(cls, features: GateFeatures, texts: Sequence[Sequence[int]], device: torch.device | str) -> PaddedTexts:
        """Token ids of at least one text."""
        ids, is_token = padded_ids(texts, least=1)
        ids, is_token = ids.to(device), is_token.to(device)
        of_tokens, log_priors = features(ids.flatten())
        of_tokens = of_tokens.view(*ids.shape, -1) * is_token[..., None]
        return cls(of_tokens, is_token, log_priors.view(ids.shape))


class SubjectFit(nn.Module):
    """Log-odds that the subjects of entries are what questions name."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.of_subject = nn.Parameter(torch.zeros(hidden_size))
        self.another = nn.Parameter(torch.zeros(hidden_size))
        # Of the word before a name, and of the one behind it.
        self.goes_on = nn.Parameter(torch.zeros(2, hidden_size))
        self.goes_on_if_rare = nn.Parameter(torch.zeros(2))
        self.log_weights = nn.Parameter(torch.tensor([_MISSING, _WORST, _BESIDE, _BROKEN]).log())
        self.bias = nn.Parameter(torch.tensor(_BIAS))

    def forward(self, questions: PaddedTexts, subjects: PaddedTexts, relations: PaddedTexts) -> Tensor:
        """[n, e], in fp32. Words of the relation, too, are known to be no part of a longer name."""
        asked = questions.is_token
        cosines = torch.einsum("nqh,esh->nesq", questions.features, subjects.features)
        there = cosines.masked_fill(~asked[:, None, None, :], -1.0)
        nearest = there.amax(3)
        another = F.softplus(_STEEP * (subjects.features @ self.another) + _ANOTHER) * (nearest <= _SAME_TOKEN)
        missing = (1 - nearest + another) * subjects.is_token
        share = _STEEP * (subjects.features @ self.of_subject) + subjects.log_priors
        weights = share.masked_fill(~subjects.is_token, -torch.inf).softmax(1).nan_to_num()
        ends = _stands_whole(there > _SAME_TOKEN, subjects.is_token)
        signs = torch.stack(
            [
                -(missing * weights).sum(2),
                -missing.amax(2),
                -self._goes_on(questions, subjects, relations, ends),
                -(~ends.any(2)).float(),
            ],
            dim=-1,
        )
        return signs @ self.log_weights.exp() + self.bias

    def _goes_on(
        self, questions: PaddedTexts, subjects: PaddedTexts, relations: PaddedTexts, ends_neq: Tensor
    ) -> Tensor:
        """How surely a word right beside the subject belongs to a longer name: [n, e], of the place where it stands most alone."""
        cosines = torch.einsum("nqh,erh->neqr", questions.features, relations.features)
        lacks = 1 - cosines.masked_fill(~relations.is_token[None, :, None], -1.0).amax(3)
        rare = questions.log_priors[..., None] * self.goes_on_if_rare
        belongs = torch.sigmoid(_STEEP * (questions.features @ self.goes_on.T) + rare + _NAME_GOES_ON)
        beside = belongs.permute(2, 0, 1)[:, :, None] * lacks * questions.is_token[:, None]
        lengths = subjects.is_token.sum(1)
        # An occurrence that ends at q has the word before it at q - length, and the one behind it at q + 1.
        before = torch.arange(ends_neq.shape[2], device=lengths.device) - lengths[:, None]
        left = beside[0].gather(2, before.clamp_min(0).expand_as(ends_neq)) * (before >= 0)
        right = F.pad(beside[1][..., 1:], (0, 1))
        alone = torch.maximum(left, right).masked_fill(~ends_neq, torch.inf).amin(2)
        return alone.masked_fill(alone.isinf(), 0)


def _stands_whole(same_nesq: Tensor, is_token_es: Tensor) -> Tensor:
    """Where in the questions a subject ends that stands there token for token: [n, e, q]."""
    ends = same_nesq[:, :, 0]
    for place in range(1, is_token_es.shape[1]):
        goes_on = F.pad(ends[..., :-1], (1, 0)) & same_nesq[:, :, place]
        ends = torch.where(is_token_es[:, place, None], goes_on, ends)
    return ends & is_token_es[:, 0, None]
