"""The layers that read found entries: attention over their tokens into the residual stream, and a pointer that copies them.

Shapes: T tokens of a request, M tokens of its entries, k entries, H width of the model, R rank, V vocabulary.

Both compare what the base thinks at a token with what it thought inside an entry. The pointer is an induction head over entries:
its key for an entry's token is the state of the token BEFORE, made by the same frozen layers as the query. After "Ada lives in" the
base is in much the same state whether that stands in an entry or in a prompt, so keys and queries begin with the same random
projection and match before anything is trained; and when the first token of a name was copied, the next one matches by itself.
A sentinel takes part in the same softmax (Merity et al. 2016, arXiv 1609.07843): what it gets is left to the base.

Nothing here knows whether it trains or serves. A token's output depends on its own state and on the reading alone, so it is
causal and needs no cache but the base's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.memory_reading import EncodedEntries

_POINTER_SCALE = 12.0
_SCORE_WEIGHT = 4.0
# With a score of 1 an entry that does not match at all begins below the sentinel, and one that matches well above it.
_SENTINEL = 10.0
_HEADS = 4
_EPSILON = 1e-6


class MemoryNorm(nn.Module):
    """Root-mean-square norm of states before the memory's layers compare them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """[…, H] → […, H] in fp32."""
        x = states.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPSILON) * self.weight


class Pointed(NamedTuple):
    """What the pointer says at each token: log-probabilities of the sentinel [T] and of the entries' tokens [T, M]."""

    sentinel: Tensor
    tokens: Tensor


class PointerHead(nn.Module):
    """Which token of which entry comes next, or none of them.

    `weigh` = λ, the weight of an entry's score among the logits: it gives the gate a gradient from the language-model loss.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        drawn = torch.randn(rank, hidden_size) / math.sqrt(hidden_size)
        self.query = nn.Parameter(drawn.clone())
        self.key = nn.Parameter(drawn.clone())
        self.value = nn.Parameter(torch.zeros(hidden_size))
        self.sentinel = nn.Parameter(torch.zeros(hidden_size))
        self.sentinel_bias = nn.Parameter(torch.tensor(_SENTINEL))
        self.log_scale = nn.Parameter(torch.tensor(math.log(_POINTER_SCALE)))
        self.weigh = nn.Parameter(torch.tensor(_SCORE_WEIGHT))

    def forward(self, states_th: Tensor, before_mh: Tensor, at_mh: Tensor, scores_m: Tensor) -> Pointed:
        """Of normed states: those of the request, and of the entries' tokens before and at each place."""
        queries = F.normalize(F.linear(states_th, self.query), dim=-1, eps=_EPSILON)
        keys = F.normalize(F.linear(before_mh, self.key), dim=-1, eps=_EPSILON)
        logits = queries @ keys.T * self.log_scale.exp() + at_mh @ self.value + self.weigh * scores_m
        nothing = states_th @ self.sentinel + self.sentinel_bias
        both = torch.cat([nothing[:, None], logits], dim=1).log_softmax(dim=1)
        return Pointed(both[:, 0], both[:, 1:])


class Fused(NamedTuple):
    """What a fusion layer gives on: states [T, H], and how much of each entry token went in [T, M], the gate counted."""

    states: Tensor
    weights: Tensor


class FusionLayer(nn.Module):
    """Reads entries at one layer of the base. Its output is zero until it learns, so it begins as if it were not there."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.heads = _HEADS if rank % _HEADS == 0 else 1
        self.norm = MemoryNorm(hidden_size)
        self.query = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size))
        self.out = nn.Parameter(torch.zeros(hidden_size, rank))
        self.gate_state = nn.Parameter(torch.zeros(hidden_size))
        self.gate_read = nn.Parameter(torch.zeros(rank))
        self.gate_bias = nn.Parameter(torch.zeros(()))
        self.null_key = nn.Parameter(torch.zeros(rank))
        self.null_value = nn.Parameter(torch.zeros(rank))
        self.null_bias = nn.Parameter(torch.zeros(()))
        self.weigh = nn.Parameter(torch.ones(()))

    def forward(self, states_th: Tensor, keys_mr: Tensor, values_mr: Tensor, scores_m: Tensor) -> Fused:
        """Of the residual stream, and of the keys and values that all fusion layers share."""
        x = self.norm(states_th)
        heads = self.heads

        def split(rows: Tensor) -> Tensor:
            return rows.view(rows.shape[0], heads, -1).transpose(0, 1)

        queries = split(F.linear(x, self.query))
        keys, values = (
            split(torch.cat([self.null_key[None], keys_mr])),
            split(torch.cat([self.null_value[None], values_mr])),
        )
        bias = torch.cat([self.null_bias[None], self.weigh * scores_m])
        attention = (queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1]) + bias).softmax(-1)
        read = (attention @ values).transpose(0, 1).flatten(1)
        gate = torch.sigmoid(x @ self.gate_state + read @ self.gate_read + self.gate_bias)
        fused = states_th + (gate[:, None] * F.linear(read, self.out)).to(states_th.dtype)
        return Fused(fused, gate[:, None] * attention[:, :, 1:].mean(0))


class GatedMemoryFusion(nn.Module):
    """Fusion layers over keys and values that they share: of the entries' tokens and of those before them, by rank R."""

    def __init__(self, hidden_size: int, rank: int, num_layers: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(rank, 2 * hidden_size) / math.sqrt(2 * hidden_size))
        self.value = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size))
        self.layers = nn.ModuleList(FusionLayer(hidden_size, rank) for _ in range(num_layers))

    def keys_and_values(self, before_mh: Tensor, at_mh: Tensor) -> tuple[Tensor, Tensor]:
        """[M, R] each, of normed states."""
        return F.linear(torch.cat([before_mh, at_mh], dim=1), self.key), F.linear(at_mh, self.value)


class Prepared(NamedTuple):
    """Entries as the layers compare them: normed states [M, H], keys and values [M, R], the score of each token's entry [M]."""

    before: Tensor
    at: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    token_ids: Tensor


class MemoryReader(nn.Module):
    """All that reads: the norm, the fusion layers, the pointer. A rank of 0 means the full width."""

    def __init__(self, hidden_size: int, rank: int, num_layers: int) -> None:
        super().__init__()
        rank = rank or hidden_size
        self.norm = MemoryNorm(hidden_size)
        self.fusion = GatedMemoryFusion(hidden_size, rank, num_layers)
        self.pointer = PointerHead(hidden_size, rank)

    def prepare(self, encoded: EncodedEntries, scores_k: Tensor) -> Prepared:
        """What all tokens of a request compare themselves with."""
        before, at = self.norm(encoded.before), self.norm(encoded.at)
        keys, values = self.fusion.keys_and_values(before, at)
        return Prepared(before, at, keys, values, scores_k[encoded.entry], encoded.token_ids)

    def point(self, states_th: Tensor, entries: Prepared) -> Pointed:
        """Where the pointer looks from these states of the residual stream."""
        pointed: Pointed = self.pointer(self.norm(states_th), entries.before, entries.at, entries.scores)
        return pointed

    def fuse(self, number: int, states_th: Tensor, entries: Prepared) -> Fused:
        """What fusion layer `number` makes of the residual stream."""
        fused: Fused = self.fusion.layers[number](states_th, entries.keys, entries.values, entries.scores)
        return fused


def mix(logits_tv: Tensor, pointed: Pointed, token_ids_m: Tensor) -> Tensor:
    """Log-probabilities [T, V]: the base's, times what the sentinel leaves to it, and what the pointer copies. In fp32."""
    base = logits_tv.float().log_softmax(-1) + pointed.sentinel[:, None]
    ids, place_m = torch.unique(token_ids_m, return_inverse=True)
    copied = pointed.tokens.new_zeros(len(logits_tv), len(ids)).index_add(1, place_m, pointed.tokens.exp())
    return base.index_copy(1, ids, torch.logaddexp(base[:, ids], copied.clamp_min(1e-38).log()))


def copied_log_probs(pointed: Pointed, token_ids_m: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    """What the pointer alone gives the label of each token, as log-probabilities [T]; -inf where no entry holds it."""
    labels_t = torch.as_tensor(labels, device=token_ids_m.device)
    matches = token_ids_m[None, :] == labels_t[:, None]
    return pointed.tokens.masked_fill(~matches, -torch.inf).logsumexp(dim=1)
