"""What the loop trains: a model, the part of it that learns, batches in a fixed order, and a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from nightschool.data.batches import Batch
from nightschool.training.optimizer import AdamW


@dataclass(frozen=True)
class LossResult:
    """`sum` of the weighted negative log likelihoods in nats (a scalar with a graph) over `tokens` trained tokens."""

    sum: Tensor
    tokens: int


class Task(Protocol):
    """All that `fit` asks of a method. Whoever has these six trains, checkpoints and resumes."""

    model: nn.Module
    optimizer: AdamW

    @property
    def fingerprint(self) -> str:
        """What identifies the data and their order; a checkpoint of other data is refused."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        ...

    def loss(self, batch: Batch) -> LossResult:
        """The loss of one micro-batch, not divided by anything."""
        ...

    def num_batches(self, epoch: int) -> int:
        """How many micro-batches the epoch has."""
        ...

    def batch(self, epoch: int, batch_index: int) -> Batch:
        """One micro-batch, on the CPU; equal for equal arguments."""
        ...
