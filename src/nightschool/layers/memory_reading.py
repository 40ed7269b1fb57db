"""What a request, or a document of a batch, may read: the entries that were found for it, as tokens and as states.

Shapes: B requests, k entries, L tokens of the longest, M tokens of all of them end to end, H width of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Address(NamedTuple):
    """What an entry and a question say of each other, as token ids: the subject, the relation, and the question in its spellings.

    `told` is how many of the entry's tokens come before its value; 0 where that is not known.
    """

    subject: tuple[int, ...]
    relation: tuple[int, ...]
    told: int
    questions: tuple[tuple[int, ...], ...]


class Candidate(NamedTuple):
    """One found entry: its id (`m123`), the row of the store that holds this version of it, its tokens, and the score of the finder.

    Without an address, which a sentence has not whose subject cannot be told, nobody looks whether it fits.
    """

    entry: str
    row: int
    token_ids: Sequence[int]
    score: float
    address: Address | None = None


def padded_ids(texts: Sequence[Sequence[int]], least: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [n, L], filled up with 0 to the longest text, or to `least`, and which of them are there [n, L]."""
    longest = max((least, *map(len, texts)))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.int64)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return ids.view(len(texts), longest), torch.arange(longest) < lengths[:, None]


@dataclass(frozen=True)
class EncodedEntries:
    """The entries of a reading after the first layers of the base, end to end.

    `before` [M, H] is the state of the token before each one, that of the anchor for the first of an entry: what the base knew when the
    token was to come. `at` [M, H] is the token's own. `token_ids` [M]; `entry` [M] is its number among the candidates.
    """

    before: Tensor
    at: Tensor
    token_ids: Tensor
    entry: Tensor


class FusedEntries(NamedTuple):
    """Entries as one fusion layer compares itself with them, the null entry first; of D = R / heads numbers a head.

    `keys` [B, heads, D, 1 + M], divided by √D already; `values` [B, heads, 1 + M, D]; `bias` [B, 1, 1, 1 + M], -inf for what only
    pads. They lie as a product takes them, because nothing of that size may be copied for each token.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


class Prepared(NamedTuple):
    """Entries as the layers of a reader compare them, of one request or of several side by side, padded to the longest.

    `pointer_keys` [B, R, M] and `pointer_bias` [B, 1, M] of the pointer, -inf for what only pads; `layers` of the fusion layers.
    `ids` [B, U] are the tokens of the vocabulary that are there, each once, and `place` [B, M] is which of them each token is. `absent`
    [B, U] says where behind the last one there is none; it is None where all have as many.
    """

    pointer_keys: Tensor
    pointer_bias: Tensor
    layers: tuple[FusedEntries, ...]
    ids: Tensor
    place: Tensor
    absent: Tensor | None = None


@dataclass(eq=False)
class MemoryReading:
    """Entries in the order of their rows, so that the order in which they were found changes no bit.

    `token_ids` [k, L] int64, `mask` [k, L], `scores` [k] fp32. `fits` [k], logarithms of how likely each entry fits the question, and
    `encoded`, which has no token of those that do not, are filled by whoever encodes it first. With no entry to read,
    reading it changes nothing.
    """

    entries: tuple[str, ...]
    rows: tuple[int, ...]
    token_ids: Tensor
    mask: Tensor
    scores: Tensor
    addresses: tuple[Address | None, ...] = ()
    fits: Tensor | None = field(default=None, repr=False)
    encoded: EncodedEntries | None = field(default=None, repr=False)

    @classmethod
    def of(cls, candidates: Iterable[Candidate], device: torch.device | str = "cpu") -> MemoryReading:
        """A reading of what was found; entries without a token are left out."""
        found = sorted((c for c in candidates if len(c.token_ids)), key=lambda c: c.row)
        token_ids, mask = padded_ids([c.token_ids for c in found])
        scores = torch.tensor([c.score for c in found], dtype=torch.float32)
        return cls(
            entries=tuple(c.entry for c in found),
            rows=tuple(c.row for c in found),
            token_ids=token_ids.to(device),
            mask=mask.to(device),
            scores=scores.to(device),
            addresses=tuple(c.address for c in found),
        )

    @property
    def is_closed(self) -> bool:
        """Whether there is nothing to read: nothing was found, or nothing that fits."""
        return len(self) == 0 or (self.encoded is not None and len(self.encoded.token_ids) == 0)

    def __len__(self) -> int:
        return len(self.entries)

    def texts(self) -> list[tuple[int, ...]]:
        """The tokens of each entry, without padding."""
        pairs = zip(self.token_ids.tolist(), self.mask.sum(1).tolist(), strict=True)
        return [tuple(ids[:length]) for ids, length in pairs]

    def without(self, entry: str) -> MemoryReading:
        """The same reading as if one entry were not there; what was encoded stays."""
        kept = [number for number, name in enumerate(self.entries) if name != entry]
        encoded = self.encoded
        if encoded is not None:
            number_of = torch.full((len(self.entries),), -1, device=encoded.entry.device)
            number_of[kept] = torch.arange(len(kept), device=encoded.entry.device)
            stays = number_of[encoded.entry] >= 0
            encoded = EncodedEntries(
                encoded.before[stays], encoded.at[stays], encoded.token_ids[stays], number_of[encoded.entry[stays]]
            )
        return MemoryReading(
            tuple(self.entries[n] for n in kept), tuple(self.rows[n] for n in kept), self.token_ids[kept],
            self.mask[kept], self.scores[kept], tuple(self.addresses[n] for n in kept),
            None if self.fits is None else self.fits[kept], encoded,
        )  # fmt: skip


@dataclass(frozen=True)
class EntryWeight:
    """How much of a token came from an entry, from 0 to 1."""

    entry: str
    row: int
    weight: float


@dataclass(frozen=True)
class TokenSource:
    """Where a token came from: `copied` out of an entry, `fused` into what the base says, read in the `prompt`, or from the
    `weights` of the base.

    `entries` are those that were read, the heaviest first. `copied` is the share of the token's probability that the pointer gave.
    """

    kind: Literal["copied", "fused", "prompt", "weights"]
    entries: tuple[EntryWeight, ...]
    copied: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        shares = [{"id": entry.entry, "weight": round(entry.weight, 6)} for entry in self.entries]
        return {"from": self.kind, "copied": round(self.copied, 6), "entries": shares}
