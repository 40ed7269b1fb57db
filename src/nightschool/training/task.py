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
    """All that `fit` asks of a method. Whoever has these trains, checkpoints and resumes.

    A place in an epoch is a number of micro-batches, or of sequences: whatever the task counts in. The micro-batch at a
    place reaches `stride` places further, to the end of the epoch at most.
    """

    model: nn.Module
    optimizer: AdamW

    @property
    def fingerprint(self) -> str:
        """What identifies the data and their order; a checkpoint of other data is refused."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of every parameter."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        ...

    def loss(self, batch: Batch) -> LossResult:
        """The loss of one micro-batch, not divided by anything."""
        ...

    @property
    def stride(self) -> int:
        """Places that a micro-batch takes, those of all processes together."""
        ...

    def epoch_length(self, epoch: int) -> int:
        """How many places the epoch has."""
        ...

    def batch(self, epoch: int, place: int) -> Batch:
        """The micro-batch at a place, on the CPU; equal for equal arguments."""
        ...

    def where(self, epoch: int, place: int) -> str:
        """Where in the data that is, for messages."""
        ...
