"""What the loop trains: a model, the part of it that learns, batches in a fixed order, and the two verbs of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nightschool.data.batches import Batch
from nightschool.models.update_cost import UpdateCost
from nightschool.training.checkpoint.checkpoint_reader import StoredTensors
from nightschool.training.checkpoint.contents import TensorSource
from nightschool.training.distributed.world import World


class Task(Protocol):
    """All that `fit` and a checkpoint ask of a method. Whoever has these trains, saves and resumes.

    Where gradients and optimizer state lie is the task's own affair: nothing else touches them.

    A place in an epoch is a number of micro-batches, or of sequences: whatever the task counts in. The micro-batch at a
    place reaches `stride` places further, to the end of the epoch at most.
    """

    model: nn.Module
    device: torch.device
    compute_dtype: torch.dtype
    world: World

    @property
    def why_not_served(self) -> str:
        """Why the server would refuse what this becomes; empty if it would not."""
        ...

    @property
    def fingerprint(self) -> str:
        """What identifies the data and their order; a checkpoint of other data is refused."""
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

    def accumulate(self, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Find the gradients of a window, which this process has its part of.

        Args:
            window: The micro-batches of one update, all of them, so that a layer can see them at once.
            units: What the summed loss is divided by, of all processes: tokens trained in the window, or pairs.
            scaler: Scales the loss before gradients are taken of it; `update` undoes it.

        Returns:
            This process's part of the loss in nats per unit, a scalar on the device; those of all processes add up.
        """
        ...

    def expert_loads(self, micro_batches: int) -> int:
        """How many times experts that are streamed are loaded in each direction for the micro-batches of a step, at most."""
        ...

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that stay of each micro-batch of so many tokens until all of the step are through; 0 if they pass one after the other."""
        ...

    def figures(self) -> Mapping[str, Tensor]:
        """What a row of metrics says of the last window beside its loss: this process's parts of means over its units."""
        ...

    def update(self, rate: float, clip: float, scaler: torch.amp.GradScaler | None, world: World) -> Tensor:
        """Update the weights with the gradients of all processes, and drop these.

        Args:
            rate: The learning rate.
            clip: The largest norm of all gradients together; 0 for none. A task may apply the factor when it likes.
            scaler: The one that `accumulate` got.
            world: The processes that train together.

        Returns:
            The norm before clipping, a scalar on the device.
        """
        ...

    def discard_gradients(self) -> None:
        """Forget what `accumulate` found, as if it had not been called."""
        ...

    def update_cost(self) -> UpdateCost:
        """What `update` takes, found without one; nothing is changed."""
        ...

    @property
    def moving_seconds(self) -> float:
        """Seconds that were spent so far to read and write weights that lie elsewhere."""
        ...

    def release(self) -> None:
        """Give the memory of gradients and optimizer state back; after the last step, when the weights are published."""
        ...

    def shard(self, stage: int) -> None:
        """Keep only this process's part of the state. All processes call it before step 1, or none does."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds, and saves, only a part of every tensor."""
        ...

    def weights(self) -> list[TensorSource]:
        """What training changes of the model, or this process's part of it."""
        ...

    def optimizer_state(self) -> list[TensorSource]:
        """What the next update needs besides the weights, or this process's part of it."""
        ...

    def optimizer_facts(self) -> dict[str, Any]:
        """`hyper_parameters`: what must be equal in the run that resumes; beside it whatever `load_state` wants to know."""
        ...

    def expected_bytes(self) -> int:
        """About how many bytes of tensors this process will save, also before the first step."""
        ...

    def load_state(self, weights: StoredTensors, optimizer: StoredTensors, facts: dict[str, Any], where: str) -> None:
        """Take over what was saved; `facts` are those of `optimizer_facts`, `where` names the checkpoint.

        Raises:
            StateMismatch: If a tensor is missing, unexpected, or of another shape or dtype; nothing was changed then.
        """
        ...

    def load_weights(self, weights: StoredTensors, where: str) -> None:
        """Take over the weights alone. Raises StateMismatch as `load_state` does."""
        ...
