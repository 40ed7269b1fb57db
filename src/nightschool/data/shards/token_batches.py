"""Micro-batches from token shards, found by their place in an epoch.

T  tokens of a sequence
B  sequences of a micro-batch
N  = B × T, tokens of a micro-batch, sequences end to end
n  tokens of a shard

Sequence i of a shard has the inputs i·T … i·T + T - 1 of its stream, and each input's label is the token after it; so
every token is predicted once, and none is shifted twice. What is left of a shard after its last whole sequence, fewer
than T + 1 tokens, is not trained. Of each shard, sequences at equal distances are held out, so that every text has its share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nightschool.data.batches import IGNORED, Batch
from nightschool.data.shards.npz import TokenIds
from nightschool.data.shards.permutation import SequenceOrder
from nightschool.data.shards.shards import Shards
from nightschool.errors import DataError, NothingToTrain

INDEX_TYPE = np.int64


@dataclass(frozen=True)
class Portion:
    """Which part of a global micro-batch this process takes: `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class TokenBatches:
    """The sequences of shards in the order of training, and those that are held out.

    The order depends on the shards, `seq_len`, `seed` and `group_shards` alone; sizes of batches and the number of
    processes cut it differently and never change it. So a position is a number of sequences, or of tokens.

    Args:
        shards: The tokens.
        seq_len: T.
        seed: Of the order.
        group_shards: Shards that are shuffled among each other.
        held_out_share: Share of each shard that is never trained.
        held_out_tokens: At most about this many tokens are held out in all.
        loss_across_documents: Whether a document may see the one before it and its first token carries loss.
        vocab_size: Ids are checked against it.

    Raises:
        NothingToTrain: If no shard has T + 1 tokens.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seq_len: int,
        seed: int,
        group_shards: int,
        held_out_share: float = 0.0,
        held_out_tokens: int = 0,
        loss_across_documents: bool = False,
        vocab_size: int,
    ) -> None:
        index = shards.index
        counts = [max(0, (shard.tokens - 1) // seq_len) for shard in index.shards]
        if not sum(counts):
            longest = max((shard.tokens for shard in index.shards), default=0)
            raise NothingToTrain(
                f"The longest of {len(counts)} shards has {longest} tokens, and a sequence of train.max_seq_len={seq_len} "
                f"needs {seq_len + 1}. Lower train.max_seq_len, or tokenize more text."
            )
        wanted = min(held_out_share * sum(counts), held_out_tokens / seq_len)
        # Shares are rounded at their running sum: each by itself, shards of which many are there would all give none.
        bounds = np.rint(np.cumsum([0, *counts]) * (wanted / sum(counts))).astype(INDEX_TYPE)
        self._held: list[int] = [min(n // 2, share) for n, share in zip(counts, np.diff(bounds).tolist(), strict=True)]
        if held_out_share > 0 and held_out_tokens > 0 and not any(self._held) and sum(counts) > 1:
            largest = int(np.argmax(counts))
            self._held[largest] = 1 if counts[largest] > 1 else 0
        self._shards, self.seq_len, self._vocab_size = shards, seq_len, vocab_size
        self._eos = index.eos_token_id
        self._loss_across_documents = loss_across_documents or self._eos is None
        self._counts, self._group_shards = counts, group_shards
        self._group: tuple[int, int] | None = None
        self._order = SequenceOrder(
            [n - held for n, held in zip(counts, self._held, strict=True)], seed=seed, group_shards=group_shards
        )
        self._held_places = [
            (shard, turn * (n // held) + n // held - 1)
            for shard, (n, held) in enumerate(zip(counts, self._held, strict=True))
            for turn in range(held)
        ]
        self._held_tokens: dict[tuple[int, int], TokenIds] = {}
        self._settings = {
            "seq_len": seq_len,
            "seed": seed,
            "group_shards": group_shards,
            "held_out": self._held,
            "loss_across_documents": self._loss_across_documents,
            "eos_token_id": self._eos,
        }
        self.fingerprint = hashlib.sha256(
            json.dumps([index.fingerprint, self._settings], sort_keys=True).encode()
        ).hexdigest()

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return self._order.num_sequences

    @property
    def num_held_out(self) -> int:
        """Sequences that are held out."""
        return len(self._held_places)

    @property
    def tokens_left_over(self) -> int:
        """Tokens at the ends of shards that fill no sequence."""
        index = self._shards.index
        return sum(shard.tokens - n * self.seq_len for shard, n in zip(index.shards, self._counts, strict=True))

    def get(self, epoch: int, place: int, count: int, portion: Portion | None = None) -> Batch:
        """The sequences `place` … `place + count - 1` of an epoch, or this process's portion of them.

        Past the end of the epoch there are fewer. A process for which none is left gets one sequence without loss, as
        all have to take the step.

        Raises:
            IndexError: If `place` lies past the end.
        """
        end = min(place + count, self.num_sequences)
        if not 0 <= place < end:
            raise IndexError(f"an epoch has {self.num_sequences} sequences, so there is no place {place}")
        group = epoch, self._order.group_of(epoch, place)
        if group != self._group:
            self._group = group
            self._shards.prefetch(self._order.upcoming_shards(epoch, place)[: 2 * self._group_shards])
        portion = portion or Portion()
        first = place + (end - place) * portion.rank // portion.world_size
        last = place + (end - place) * (portion.rank + 1) // portion.world_size
        idle = last == first
        if idle:
            first, last = place, place + 1
        return self._batch(self._members(epoch, first, last), is_idle=idle)

    def held_out(self, place: int, count: int) -> Batch:
        """The held-out sequences `place` … `place + count - 1`, fewer at the end.

        They are few and lie in many shards, so their tokens stay in memory: shards of a bucket are fetched for them once.
        """
        members = self._held_places[place : place + count]
        for member in members:
            if member not in self._held_tokens:
                self._held_tokens[member] = np.array(self._read(member))
        return self._batch(members)

    def where(self, epoch: int, place: int) -> str:
        """The shard and the token of a sequence, for messages."""
        shard, sequence = self._members(epoch, place, place + 1)[0]
        return f"{self._shards.index.shards[shard].file}, token {sequence * self.seq_len}"

    def _members(self, epoch: int, first: int, last: int) -> list[tuple[int, int]]:
        """Shard and sequence at each of the places `first` … `last - 1`."""
        shards, numbers = self._order.locate(epoch, np.arange(first, last, dtype=INDEX_TYPE))
        return [
            (shard, self._sequence(shard, number))
            for shard, number in zip(shards.tolist(), numbers.tolist(), strict=True)
        ]

    def _sequence(self, shard: int, number: int) -> int:
        """Which sequence of the shard is number `number` of those that are not held out."""
        held = self._held[shard]
        if not held:
            return number
        distance = self._counts[shard] // held
        turn, within = divmod(number, distance - 1)
        return turn * distance + within if turn < held else number + held

    def _read(self, member: tuple[int, int]) -> TokenIds:
        """The tokens of a sequence and the one after it, [T + 1], mapped."""
        shard, sequence = member
        start = sequence * self.seq_len
        return self._shards.tokens(shard)[start : start + self.seq_len + 1]

    def _batch(self, members: list[tuple[int, int]], *, is_idle: bool = False) -> Batch:
        T, count = self.seq_len, len(members)  # noqa: N806 - the legend's letters
        tokens = np.empty((count, T + 1), dtype=np.int64)
        for row, member in enumerate(members):
            held = self._held_tokens.get(member)
            tokens[row] = self._read(member) if held is None else held
        if int(tokens.max()) >= self._vocab_size or int(tokens.min()) < 0:
            self._refuse(tokens, members)
        ids, labels = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
        weights = np.ones(count * T, dtype=np.float32)
        bounds = np.arange(0, count * T + 1, T, dtype=INDEX_TYPE)
        if not self._loss_across_documents:
            ends = np.flatnonzero(ids == self._eos)
            if len(ends):
                # After the end of a document comes another one, which nothing in this one can tell.
                labels = labels.copy()
                labels[ends], weights[ends] = IGNORED, 0
                bounds = np.union1d(bounds, ends + 1)
        if is_idle:
            labels, weights = np.full_like(labels, IGNORED), np.zeros_like(weights)
        return Batch(
            input_ids=torch.from_numpy(np.ascontiguousarray(ids))[None],
            position_ids=torch.from_numpy(_positions(bounds))[None],
            labels=torch.from_numpy(np.ascontiguousarray(labels))[None],
            weights=torch.from_numpy(weights)[None],
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=int(np.diff(bounds).max()),
            tokens_trained=int(np.count_nonzero(weights)),
            is_idle=is_idle,
        )

    def _refuse(self, tokens: NDArray[np.int64], members: list[tuple[int, int]]) -> None:
        row, column = np.argwhere((tokens >= self._vocab_size) | (tokens < 0))[0].tolist()
        shard, sequence = members[row]
        raise DataError(
            f"Token {sequence * self.seq_len + column} of {self._shards.index.shards[shard].file} is {int(tokens[row, column])}, and the "
            f"vocabulary has the ids 0 to {self._vocab_size - 1}. The shard is damaged, or belongs to another tokenizer."
        )


def _positions(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, … in each document, [N]."""
    lengths = np.diff(bounds)
    positions: NDArray[np.int64] = np.arange(int(bounds[-1]), dtype=INDEX_TYPE) - np.repeat(bounds[:-1], lengths)
    return positions
