"""Micro-batches of packed documents, found by their number in constant time.

N  tokens of a micro-batch, documents laid end to end
D  documents of a micro-batch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from nightschool.data.chat.render import Rendered
from nightschool.data.packing import plan_epoch
from nightschool.errors import NothingToTrain

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU. No document may see another: `cu_seqlens` says where each begins and ends."""

    input_ids: torch.Tensor  # [1, N] int64
    position_ids: torch.Tensor  # [1, N] int64, from 0 in each document
    labels: torch.Tensor  # [1, N] int64, the token to be predicted at each place; -100 where none carries loss
    weights: torch.Tensor  # [1, N] float32, the loss weight of each label
    cu_seqlens: torch.Tensor  # [D + 1] int32, from 0 to N
    max_seqlen: int  # tokens of the longest document
    tokens_trained: int  # labels that carry loss
    is_idle: bool = False  # stands for a batch that is not there, where all processes have to take the step

    @property
    def tokens_consumed(self) -> int:
        """Tokens of the data that it takes, trained or not."""
        return 0 if self.is_idle else int(self.input_ids.shape[-1])

    @property
    def loss_units(self) -> int:
        """What a sum of losses is divided by: tokens that carry loss."""
        return self.tokens_trained

    def without_loss(self) -> Batch:
        """The same tokens, none of which carries loss, in place of a batch that is not there."""
        return replace(
            self,
            labels=torch.full_like(self.labels, IGNORED),
            weights=torch.zeros_like(self.weights),
            tokens_trained=0,
            is_idle=True,
        )


class Batches:
    """Rendered documents in compact arrays, and the plan of each epoch.

    Examples with a document of which no token carries loss are left out; `num_left_out` counts them, and `kept` has the
    numbers of the others.

    Args:
        rendered: The documents, in the order of the examples.
        batch_size: Examples per micro-batch.
        tokens_per_batch: In place of `batch_size`: fill each micro-batch up to this many tokens.
        seed: Of the order.
        documents_per_example: So many documents that follow each other are one example, and stay together.

    Raises:
        NothingToTrain: If no document has a token that carries loss.
    """

    def __init__(
        self,
        rendered: Iterable[Rendered],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int,
        documents_per_example: int = 1,
    ) -> None:
        documents = list(rendered)
        starts = range(0, len(documents), documents_per_example)
        examples = [documents[start : start + documents_per_example] for start in starts]
        self.kept = [number for number, one in enumerate(examples) if all(d.trained_tokens for d in one)]
        self.num_left_out = len(examples) - len(self.kept)
        if not self.kept:
            raise NothingToTrain(
                f"None of the {len(examples)} examples has a token that would carry loss. "
                "Check the formats, the weights of the turns, and max_seq_len."
            )
        kept = [document for number in self.kept for document in examples[number]]
        self._ids = np.concatenate([np.asarray(d.input_ids, dtype=np.int32) for d in kept])
        self._weights = np.concatenate([np.asarray(d.weights, dtype=np.float32) for d in kept])
        self._lengths = np.array([len(d.input_ids) for d in kept], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._per_example = documents_per_example
        self._example_lengths = self._lengths.reshape(-1, documents_per_example).sum(axis=1)
        self._settings = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "seed": seed}
        if documents_per_example > 1:
            self._settings["documents_per_example"] = documents_per_example
        self._batch_size, self._tokens_per_batch, self._seed = batch_size, tokens_per_batch, seed
        self._planned: tuple[int, list[list[int]]] | None = None
        self.fingerprint = self._fingerprint()

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self._starts[-1])

    @property
    def tokens_trained(self) -> int:
        """Tokens of one epoch that carry loss."""
        return int(np.count_nonzero(self._weights))

    def num_batches(self, epoch: int) -> int:
        """Micro-batches of an epoch. With `tokens_per_batch` epochs may differ by a few."""
        return len(self._plan(epoch))

    def get(self, epoch: int, index: int) -> Batch:
        """Micro-batch number `index`, from 0, of an epoch.

        Raises:
            IndexError: If the epoch has no such micro-batch.
        """
        plan = self._plan(epoch)
        if not 0 <= index < len(plan):
            raise IndexError(f"epoch {epoch} has {len(plan)} micro-batches, so there is no number {index}")
        members = [
            document
            for example in plan[index]
            for document in range(example * self._per_example, (example + 1) * self._per_example)
        ]
        lengths = self._lengths[members]
        cu = np.concatenate([[0], np.cumsum(lengths)])
        ids, labels, weights, positions = [], [], [], []
        for member, length in zip(members, lengths.tolist(), strict=True):
            start = self._starts[member]
            document = self._ids[start : start + length].astype(np.int64)
            weight = np.append(self._weights[start + 1 : start + length], np.float32(0))
            label = np.append(document[1:], IGNORED)
            label[weight == 0] = IGNORED
            ids.append(document)
            labels.append(label)
            weights.append(weight)
            positions.append(np.arange(length))
        weights_n = np.concatenate(weights)
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(ids))[None],
            position_ids=torch.from_numpy(np.concatenate(positions))[None],
            labels=torch.from_numpy(np.concatenate(labels))[None],
            weights=torch.from_numpy(weights_n)[None],
            cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            tokens_trained=int(np.count_nonzero(weights_n)),
        )

    def examples_of(self, epoch: int, index: int) -> list[int]:
        """Which of the examples that were not left out are in a micro-batch, in its order."""
        return self._plan(epoch)[index]

    def _plan(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch. The last epoch that was asked for is kept."""
        if self._planned is None or self._planned[0] != epoch:
            plan = plan_epoch(
                self._example_lengths,
                batch_size=self._batch_size,
                tokens_per_batch=self._tokens_per_batch,
                seed=self._seed,
                epoch=epoch,
            )
            self._planned = (epoch, plan)
        return self._planned[1]

    def _fingerprint(self) -> str:
        """SHA-256 over what is trained: tokens, weights, borders and settings. Text and tokenizer are in the tokens."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        for array in (self._lengths, self._ids, self._weights):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
