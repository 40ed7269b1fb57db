"""Sharded training: each process keeps a part of every parameter, of its gradient and of its moments (FSDP2).

The layers are gathered one after the other as they are needed; what is outside of them (embedding, last norm, head) is
gathered for the whole pass, because the loss uses the head's weights in chunks. `zero_stage` 3 drops a layer's weights after
its forward pass and gathers them again for the backward pass; 1 and 2 keep them until then. (Rajbhandari et al., "ZeRO:
memory optimizations toward training trillion parameter models", 2020; torch.distributed.fsdp.fully_shard.)

Each process saves the part that it holds, so that none needs the memory of the whole state to save or to resume. To begin,
each loads the whole model before it lets go of the others' parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nightschool.data.batches import Batch
from nightschool.errors import ModelError
from nightschool.layers.forward import ForwardPath, causal_lm, document_loss
from nightschool.training.distributed.world import World


class LossModule(nn.Module):
    """The model together with its loss, so that all weights are there while the loss is computed."""

    def __init__(self, model: nn.Module, path: ForwardPath) -> None:
        super().__init__()
        self.model = model
        self.path = path

    def forward(self, batch: Batch, likeliest: Tensor) -> tuple[Tensor, int]:
        """As `document_loss`."""
        return document_loss(self.model, self.path, batch, likeliest=likeliest)


def shard_model(model: nn.Module, path: ForwardPath, world: World, stage: int) -> LossModule:
    """Replace the parameters of `model` by this process's part of each; all processes hold the same model before.

    Raises:
        ModelError: If the model has no list of layers.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    root = LossModule(model, path)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=stage == 3)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    return root


def _layers(model: nn.Module) -> nn.ModuleList:
    inner: Any = causal_lm(model)
    count = inner.config.get_text_config().num_hidden_layers
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(inner).__name__} has no list of {count} layers to shard. Write train.zero_stage: 0.")


def scaled_gradient(value: Tensor, factor: int) -> Tensor:
    """The same value, whose gradient is `factor` times as large: shards average gradients, and we want their sum."""
    return value + (factor - 1) * (value - value.detach())


def own_parts(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What this process saves of each tensor: its rows, and, in the first process, what all have alike."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            rows: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
            if len(rows):
                parts[name] = rows
        elif rank == 0:
            parts[name] = tensor
    return parts


def like(target: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `target`, or all of it, on its device. Nothing is sent."""
    moved = tensor.to(target.device, copy=True)
    if not isinstance(target, DTensor):
        return moved
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def put(target: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's part of it."""
    if isinstance(target, DTensor):
        target.to_local().copy_(like(target, tensor).to_local())  # type: ignore[attr-defined]
    else:
        target.copy_(tensor)
