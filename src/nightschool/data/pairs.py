"""Preference pairs in packed micro-batches: of each, the better answer and then the worse one, after the same turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.data.batches import Batch, Batches
from nightschool.data.chat.render import Rendered


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """A micro-batch of pairs. `reference` [pairs, 2] float32: what the reference gives better and worse answer, in nats."""

    reference: Tensor

    @property
    def loss_units(self) -> int:
        """Pairs; none in a batch that is not there."""
        return 0 if self.is_idle else len(self.reference)


class PairBatches(Batches):
    """Rendered pairs, two documents each, with the reference's log-likelihoods of them.

    A pair of which one answer has no token that carries loss is left out. The likelihoods are 0 until they are set.
    """

    def __init__(self, rendered: Iterable[Rendered], **settings: Any) -> None:
        super().__init__(rendered, documents_per_example=2, **settings)
        self.reference = torch.zeros(len(self.kept), 2)

    def get(self, epoch: int, index: int) -> PairBatch:
        """As `Batches.get`."""
        batch = super().get(epoch, index)
        return PairBatch(**vars(batch), reference=self.reference[self.examples_of(epoch, index)])
