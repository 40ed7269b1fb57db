"""The layers that read found entries: attention over their tokens into the residual stream, and a pointer that copies them.

Shapes: B requests (or documents), each with T tokens that read, M tokens of its entries, k entries; H width of the model, R rank,
V vocabulary, N tokens that logits are wanted for. Requests of a step are padded to the longest, so that a step takes the same few
operations however many read.

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
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.memory_fit import SubjectFit
from nightschool.layers.memory_reading import FusedEntries, MemoryReading, Prepared
from nightschool.layers.memory_relation import RelationFit

_POINTER_SCALE = 12.0
_SCORE_WEIGHT = 4.0
# With a score of 1 an entry that does not match at all begins below the sentinel, and one that matches well above it.
_SENTINEL = 10.0
_HEADS = 4
_EPSILON = 1e-6


class MemoryNorm(nn.Module):
    """Root-mean-square norm of states before the memory's layers compare them.

    All norms of a reader differ in their weights alone, so that states that several of them see are brought to one length once.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """[…, H] → […, H] in fp32."""
        return self.weigh(of_one_length(states))

    def weigh(self, unit: Tensor) -> Tensor:
        """The same of states that `of_one_length` has seen."""
        return unit * self.weight


def of_one_length(states: Tensor) -> Tensor:
    """States […, H] divided by their root mean square, in fp32."""
    return F.rms_norm(states.float(), states.shape[-1:], eps=_EPSILON)


def of_length_one(vectors: Tensor) -> Tensor:
    """Vectors […, R] divided by their length."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(_EPSILON)


class Pointed(NamedTuple):
    """What the pointer says at each token: log-probabilities of the sentinel […] and of the entries' tokens […, M]."""

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

    def keys_and_bias(
        self, before_mh: Tensor, at_mh: Tensor, scores_m: Tensor, fits_m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of normed states of the entries' tokens, before and at each place: keys [R, M], and what each begins with [1, M]."""
        keys = of_length_one(F.linear(before_mh, self.key)) * self.log_scale.exp()
        return keys.T.contiguous(), (at_mh @ self.value + self.weigh * scores_m + fits_m)[None]

    def forward(self, states_bth: Tensor, keys_brm: Tensor, bias_b1m: Tensor) -> Pointed:
        """Of normed states of those who read."""
        queries = of_length_one(F.linear(states_bth, self.query))
        nothing = F.linear(states_bth, self.sentinel[None], self.sentinel_bias[None])
        both = torch.cat([nothing, torch.baddbmm(bias_b1m, queries, keys_brm)], dim=-1).log_softmax(dim=-1)
        return Pointed(both[..., 0], both[..., 1:])


class Fused(NamedTuple):
    """What a fusion layer gives on: states [B, T, H], and what it looked at: attention [B, heads, T, 1 + M], gate [B, T, 1]."""

    states: Tensor
    attention: Tensor
    gate: Tensor

    @property
    def weights(self) -> Tensor:
        """How much of each entry token went in [B, T, M], the gate counted."""
        return self.gate * self.attention[..., 1:].mean(1)


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

    def entries(self, keys_mr: Tensor, values_mr: Tensor, scores_m: Tensor, fits_m: Tensor) -> FusedEntries:
        """What this layer compares itself with, the null entry first; B is 1."""
        keys = torch.cat([self.null_key[None], keys_mr]).view(1 + len(keys_mr), self.heads, -1)
        values = torch.cat([self.null_value[None], values_mr]).view(1 + len(values_mr), self.heads, -1)
        keys = keys.permute(1, 2, 0) / math.sqrt(keys.shape[-1])
        bias = torch.cat([self.null_bias[None], self.weigh * scores_m + fits_m])
        return FusedEntries(keys.contiguous()[None], values.transpose(0, 1).contiguous()[None], bias[None, None, None])

    def forward(self, states_bth: Tensor, unit_bth: Tensor, entries: FusedEntries) -> Fused:
        """Of the residual stream, as it is and of one length."""
        x = self.norm.weigh(unit_bth)
        queries = F.linear(x, self.query).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        attention = (queries @ entries.keys + entries.bias).softmax(-1)
        read = (attention @ entries.values).transpose(1, 2).flatten(2)
        open_by = F.linear(x, self.gate_state[None], self.gate_bias[None]) + F.linear(read, self.gate_read[None])
        gate = torch.sigmoid(open_by)
        fused = states_bth + (gate * F.linear(read, self.out)).to(states_bth.dtype)
        return Fused(fused, attention, gate)


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


class MemoryReader(nn.Module):
    """All that reads: what tells whether an entry fits, the norm, the fusion layers, the pointer. A rank of 0 means the full width."""

    def __init__(self, hidden_size: int, rank: int, num_layers: int) -> None:
        super().__init__()
        rank = rank or hidden_size
        self.norm = MemoryNorm(hidden_size)
        self.fusion = GatedMemoryFusion(hidden_size, rank, num_layers)
        self.pointer = PointerHead(hidden_size, rank)
        self.subject_fit = SubjectFit(hidden_size)
        self.relation_fit = RelationFit(hidden_size, rank)

    def prepare(self, reading: MemoryReading) -> Prepared:
        """What all tokens of a request compare themselves with, of entries that were encoded; B is 1."""
        encoded = reading.encoded
        assert encoded is not None, "entries are encoded before they are prepared"
        assert reading.fits is not None, "whoever encodes entries tells how they fit"
        # As what reads them: in fp32, also where the base computes in 16 bits.
        with torch.autocast(encoded.at.device.type, enabled=False):
            before, at = self.norm(encoded.before), self.norm(encoded.at)
            scores, fits = reading.scores[encoded.entry], reading.fits[encoded.entry]
            pointer_keys, pointer_bias = self.pointer.keys_and_bias(before, at, scores, fits)
            keys, values = self.fusion.keys_and_values(before, at)
            layers = tuple(cast(FusionLayer, layer).entries(keys, values, scores, fits) for layer in self.fusion.layers)
        ids, place = torch.unique(encoded.token_ids, return_inverse=True)
        return Prepared(pointer_keys[None], pointer_bias[None], layers, ids[None], place[None])

    def prepare_all(self, readings: Sequence[MemoryReading]) -> Prepared:
        """The same of several requests, side by side."""
        return side_by_side([self.prepare(reading) for reading in readings])

    def point(self, unit_bth: Tensor, entries: Prepared) -> Pointed:
        """Where the pointer looks from these states of the residual stream, which are of one length."""
        pointed: Pointed = self.pointer(self.norm.weigh(unit_bth), entries.pointer_keys, entries.pointer_bias)
        return pointed

    def fuse(self, number: int, states_bth: Tensor, unit_bth: Tensor, entries: Prepared) -> Fused:
        """What fusion layer `number` makes of the residual stream."""
        fused: Fused = self.fusion.layers[number](states_bth, unit_bth, entries.layers[number])
        return fused


def side_by_side(parts: Sequence[Prepared]) -> Prepared:
    """Entries of several requests as one, padded: what is not there gets no weight."""
    if len(parts) == 1:
        return parts[0]
    layers = tuple(
        FusedEntries(
            _padded([one.keys for one in own]),
            _padded([one.values for one in own], dim=-2),
            _padded([one.bias for one in own], fill=-math.inf),
        )
        for own in zip(*(part.layers for part in parts), strict=True)
    )
    return Prepared(
        _padded([part.pointer_keys for part in parts]),
        _padded([part.pointer_bias for part in parts], fill=-math.inf),
        layers,
        _padded([part.ids for part in parts]),
        _padded([part.place for part in parts]),
        _absent([part.ids.shape[1] for part in parts], parts[0].ids.device),
    )


def _absent(counts: Sequence[int], device: torch.device) -> Tensor | None:
    """Where the rows of so many ids are only filled up; None if none is."""
    longest = max(counts)
    if min(counts) == longest:
        return None
    return torch.arange(longest, device=device)[None] >= torch.tensor(counts, device=device)[:, None]


def _padded(rows: Sequence[Tensor], *, dim: int = -1, fill: float = 0) -> Tensor:
    """Rows one after the other along the first dimension, each filled up along `dim` to the longest."""
    longest = max(row.shape[dim] for row in rows)
    after = (0,) * (-2 * dim - 1)
    return torch.cat([F.pad(row, (*after, longest - row.shape[dim]), value=fill) for row in rows])


def mix(
    logits_nv: Tensor, pointed: Pointed, ids_nu: Tensor, place_nm: Tensor, absent_nu: Tensor | None = None
) -> Tensor:
    """Log-probabilities [N, V]: the base's, times what the sentinel leaves to it, and what the pointer copies. In fp32.

    Args:
        logits_nv: Of the base.
        pointed: Of the same tokens, [N] and [N, M].
        ids_nu: The tokens of the vocabulary that may be copied at each, once each.
        place_nm: Which of them each token of the entries is.
        absent_nu: Where a row has fewer of them; None if none has.
    """
    base, left = logits_nv.float().log_softmax(-1), pointed.sentinel[:, None]
    # Nothing of the size of the vocabulary is made twice where no gradient comes back.
    learns = base.requires_grad or left.requires_grad
    base = base + left if learns else base.add_(left)
    copied = pointed.tokens.new_zeros(ids_nu.shape).scatter_add_(1, place_nm, pointed.tokens.exp())
    there = base.gather(1, ids_nu)
    # log(e^a + e^b) = a + softplus(b - a), which adds up: what only pads adds 0 to token 0.
    more = F.softplus(copied.clamp_min(1e-38).log() - there)
    if absent_nu is not None:
        more = more.masked_fill(absent_nu, 0)
    return base.scatter_add(1, ids_nu, more) if learns else base.scatter_add_(1, ids_nu, more)


def copied_log_probs(pointed: Pointed, token_ids_m: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    """What the pointer alone gives the label of each token, as log-probabilities [T]; -inf where no entry holds it."""
    labels_t = torch.as_tensor(labels, device=token_ids_m.device)
    matches = token_ids_m[None, :] == labels_t[:, None]
    return pointed.tokens.masked_fill(~matches, -torch.inf).logsumexp(dim=1)
