"""The tasks of causal language models: fine-tuning on examples, pretraining on token shards."""

from __future__ import annotations

from functools import partial

from nightschool.data.batches import Batch, Batches
from nightschool.data.shards.token_batches import TokenBatches
from nightschool.training.task import CausalTask


class FinetuneTask(CausalTask[Batches]):
    """Examples, packed into micro-batches that are planned for each epoch. The position counts micro-batches.

    Several processes take one micro-batch each; one for which none is left at the end of an epoch takes the step without
    loss.
    """

    @property
    def stride(self) -> int:
        return self.world.size

    def epoch_length(self, epoch: int) -> int:
        return self.batches.num_batches(epoch)

    def batch(self, epoch: int, place: int) -> Batch:
        mine = place + self.world.rank
        if mine < self.batches.num_batches(epoch):
            return self.batches.get(epoch, mine)
        return self.batches.get(epoch, place).without_loss()

    def where(self, epoch: int, place: int) -> str:
        return f"epoch {epoch}, micro-batch {place}"

    def heldout_loss(self, batches: Batches) -> tuple[float, int]:
        """Loss in nats per token and tokens of the held-out batches, with dropout off."""
        return self._heldout_loss([partial(batches.get, 0, index) for index in range(batches.num_batches(0))])


class PretrainTask(CausalTask[TokenBatches]):
    """Sequences of token shards. The position counts sequences, of all processes together."""

    @property
    def stride(self) -> int:
        return self.batch_size * self.world.size

    def epoch_length(self, epoch: int) -> int:  # noqa: ARG002 - all epochs are equally long
        return self.batches.num_sequences

    def batch(self, epoch: int, place: int) -> Batch:
        return self.batches.get(epoch, place, self.stride, self.world.portion)

    def where(self, epoch: int, place: int) -> str:
        return f"epoch {epoch}, sequence {place}: {self.batches.where(epoch, place)}"

    def heldout_loss(self) -> tuple[float, int]:
        """Loss in nats per token and tokens of the held-out sequences, with dropout off."""
        starts = range(0, self.batches.num_held_out, self.batch_size)
        return self._heldout_loss([partial(self.batches.held_out, start, self.batch_size) for start in starts])
