"""The tasks of causal language models: fine-tuning on examples, pretraining on token shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from nightschool.config.recipe import Train
from nightschool.data.batches import IGNORED, Batch, Batches
from nightschool.data.shards.token_batches import TokenBatches
from nightschool.errors import DataError, ModelError
from nightschool.evaluation.heldout import autocast, heldout_sum, on_device
from nightschool.layers.forward import ForwardPath, checkpoint_activations, document_loss, prepare
from nightschool.training.distributed.sharding import LossModule, scaled_gradient, shard_model
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.optimizer import AdamW, AdamWSettings, embedding_names
from nightschool.training.task import LossResult

Source = TypeVar("Source", bound=Batches | TokenBatches)


class CausalTask(Generic[Source]):
    """A causal language model of `transformers`, bare or with PEFT adapters, its optimizer, and its loss over documents.

    What learns is what requires gradients when the task is made. Products run in `compute_dtype` under autocast;
    parameters and their sums stay in their own dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Source,
        train: Train,
        *,
        compute_dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        self.model = model
        self.batches: Source = batches
        self.batch_size = train.batch_size
        self.world = world
        self.compute_dtype = compute_dtype
        self.device = next(model.parameters()).device
        self.path: ForwardPath = prepare(model)
        if train.gradient_checkpointing:
            checkpoint_activations(model)
        if train.compile:
            _compile_feed_forward(model)
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ModelError("No parameter of the model learns. Use method: full, or check lora.target_modules.")
        self._settings = AdamWSettings.from_recipe(train)
        self.optimizer = AdamW(self._trainable, self._settings, embedding_names(model))
        self._sharded: LossModule | None = None

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._trainable

    def _heldout_loss(self, batches: Sequence[Callable[[], Batch]]) -> tuple[float, int]:
        """The mean over all batches, of which each process computes every `world.size`-th."""
        size = self.world.size
        mine = list(batches[self.world.rank :: size])
        if self.is_sharded and len(mine) < -(-len(batches) // size):
            # Weights are gathered from all processes, so all of them compute as often.
            mine.append(lambda: without_loss(batches[0]()))
        total, tokens = heldout_sum(
            self.model,
            (make() for make in mine),
            forward=self._forward,
            device=self.device,
            compute_dtype=self.compute_dtype,
        )
        total, count = self.world.float_sums(total, tokens)
        if not count:
            raise DataError("No token of the held-out data carries loss. Hold out something that has an answer.")
        return total / count, int(count)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of every parameter."""
        return self._sharded is not None

    def shard(self, stage: int) -> None:
        """Keep only the part of parameters, gradients and moments that is this process's. All call it before step 1."""
        kept = embedding_names(self.model)
        self._sharded = shard_model(self.model, self.path, self.world, stage)
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = AdamW(self._trainable, self._settings, kept)

    def loss(self, batch: Batch) -> LossResult:
        with autocast(self.device, self.compute_dtype):
            loss_sum, tokens = self._forward(on_device(batch, self.device))
        if self.is_sharded:
            loss_sum = scaled_gradient(loss_sum, self.world.size)
        return LossResult(loss_sum, tokens)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        if self._sharded is not None:
            result: tuple[torch.Tensor, int] = self._sharded(batch)
            return result
        return document_loss(self.model, self.path, batch)


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
        return without_loss(self.batches.get(epoch, place))

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


def without_loss(batch: Batch) -> Batch:
    """The same tokens, none of which carries loss, in place of a batch that is not there."""
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORED),
        weights=torch.zeros_like(batch.weights),
        tokens_trained=0,
        is_idle=True,
    )


def _compile_feed_forward(model: nn.Module) -> None:
    """Compile the feed-forward block of every layer.

    The layers themselves are left alone: the layout of the documents differs in every batch, and each new layout
    would compile them anew.

    Raises:
        ModelError: If the model has no such blocks.
    """
    blocks = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "mlp"]
    if not blocks:
        raise ModelError("The model has no feed-forward blocks named `mlp` to compile. Write train.compile=false.")
    for block in blocks:
        block.compile(dynamic=True)
