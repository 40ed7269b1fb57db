"""The memory gate: two trained heads that turn a text into the two halves of an address, of its subject and of its relation.

Shapes: n tokens of s texts end to end, V vocabulary, H width of the base's embedding, half = `knowledge_dim` / 2, r rank.

What a head computes of the embeddings E of one text, in fp32; `memory.encoders` computes the same without torch, from the same file:

    h_t = (E_t - mean of the table) / |E_t - mean of the table|
    w   = softmax_t(attention · h_t + log prior_t)         prior_t = log(1 + t / 100)² + 1e-4 of the token's number t
    address = unit vector of (fixed + b · a) Σ_t w_t h_t

`fixed` never learns: orthonormal rows from a fixed seed, or the identity. The low rank is added to it, so that an untrained head
says something already, and learns; a product of two factors alone, one of them 0, would be blind and stay so.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.errors import ModelError

# Tokens below this number are as common as any: byte pair encoding numbers tokens by how common they are.
_COMMON = 100.0
_LEAST_PRIOR = 1e-4
_EPSILON = 1e-12


def text_for_gate(text: str) -> str:
    """A text as it is tokenized for the gate, without special tokens: words inside a text are spelled with a space before them."""
    return " " + " ".join(text.split())


def fixed_projection(hidden_size: int, half: int) -> Tensor:
    """What both heads project with before training, [half, H]."""
    if half == hidden_size:
        return torch.eye(half)
    square, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((hidden_size, half)))
    return torch.from_numpy(np.ascontiguousarray(square.T, dtype=np.float32))


class GateFeatures:
    """What the gate sees of tokens: the embeddings of a base, frozen. Looks at the table once."""

    def __init__(self, table_vh: Tensor) -> None:
        self._table = table_vh.detach()
        self._mean = self._table.float().mean(dim=0)

    @property
    def device(self) -> torch.device:
        """Where token ids are to lie."""
        return self._table.device

    def __call__(self, token_ids_n: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, H] and logarithms of the priors [n]."""
        features = F.normalize(self._table[token_ids_n].float() - self._mean, dim=-1, eps=_EPSILON)
        priors = torch.log1p(token_ids_n.float() / _COMMON) ** 2 + _LEAST_PRIOR
        return features, priors.log()


class Projection(nn.Module):
    """H → half: a fixed matrix with a low rank added; with rank 0 all of it learns."""

    fixed: Tensor
    a: Tensor

    def __init__(self, hidden_size: int, half: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed_projection(hidden_size, half), persistent=False)
        if rank:
            self.a = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size))
        else:
            self.register_buffer("a", torch.eye(hidden_size))
        self.b = nn.Parameter(torch.zeros(half, rank or hidden_size))

    def forward(self, pooled_sh: Tensor) -> Tensor:
        """[s, H] → [s, half]."""
        return F.linear(pooled_sh, self.fixed) + F.linear(F.linear(pooled_sh, self.a), self.b)


class AddressHead(nn.Module):
    """One half of an address: pools the tokens of a text by attention and projects them."""

    def __init__(self, hidden_size: int, half: int, rank: int) -> None:
        super().__init__()
        self.attention = nn.Parameter(torch.zeros(hidden_size))
        self.projection = Projection(hidden_size, half, rank)

    def forward(self, features_nh: Tensor, log_priors_n: Tensor, lengths: list[int]) -> Tensor:
        """Of texts of these lengths, end to end → unit vectors [s, half]."""
        counts = torch.tensor(lengths, device=features_nh.device)
        text_n = torch.repeat_interleave(torch.arange(len(lengths), device=features_nh.device), counts)
        logits = features_nh @ self.attention + log_priors_n
        highest = logits.new_full((len(lengths),), -torch.inf).scatter_reduce(0, text_n, logits.detach(), "amax")
        weights = (logits - highest[text_n]).exp()
        sums = weights.new_zeros(len(lengths)).index_add(0, text_n, weights)
        zeros = features_nh.new_zeros(len(lengths), features_nh.shape[1])
        pooled = zeros.index_add(0, text_n, weights[:, None] * features_nh) / sums.clamp_min(_EPSILON)[:, None]
        return F.normalize(self.projection(pooled), dim=-1, eps=_EPSILON)


class MemoryGate(nn.Module):
    """Addresses of texts: where an entry lies, and what a question looks for.

    Args:
        hidden_size: Width of the base's embedding.
        knowledge_dim: Of an address; even, and at most twice that width.
        rank: Of what learns in each projection; 0 for all of it.

    Raises:
        ModelError: If there can be no address of that size.
    """

    def __init__(self, hidden_size: int, knowledge_dim: int, rank: int) -> None:
        super().__init__()
        if knowledge_dim % 2 or knowledge_dim < 2:
            raise ModelError(
                f"memory.knowledge_dim is {knowledge_dim}, and an address has two halves. Write {knowledge_dim + 1}."
            )
        if knowledge_dim > 2 * hidden_size:
            raise ModelError(
                f"memory.knowledge_dim is {knowledge_dim}, and half of it is more than the width {hidden_size} of this base. "
                f"Write at most {2 * hidden_size}."
            )
        self.subject = AddressHead(hidden_size, knowledge_dim // 2, rank)
        self.relation = AddressHead(hidden_size, knowledge_dim // 2, rank)


def reading_scores(subject_cosines: Tensor, relation_cosines: Tensor) -> Tensor:
    """What the layers that read are told of a found entry: the mean of its two cosines."""
    return (subject_cosines + relation_cosines) / 2
