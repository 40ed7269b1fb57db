"""The loss on what was never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from nightschool.data.batches import Batch
from nightschool.errors import DataError
from nightschool.layers.forward import ForwardPath, causal_lm, document_loss, prepare

AnyBatch = TypeVar("AnyBatch", bound=Batch)


def heldout_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    path: ForwardPath | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[float, int]:
    """Return the loss in nats per token that carries loss, and how many such tokens there were.

    The sum runs over all batches before it is divided, so neither the size nor the order of the batches matters, and
    no batch is padded. The model is evaluated without dropout and left as it was found: training flags, attention
    and random state.

    Args:
        model: A causal language model, bare or with adapters.
        batches: The held-out examples, on any device.
        path: How the model is run, if `nightschool.layers.forward.prepare` was called already.
        compute_dtype: Below fp32, the forward pass runs under autocast.

    Raises:
        DataError: If no token carries loss.
    """
    with as_found(model):
        used = path or prepare(model)
        total, tokens = heldout_sum(
            model,
            batches,
            forward=lambda batch: document_loss(model, used, batch),
            device=next(model.parameters()).device,
            compute_dtype=compute_dtype,
        )
    if tokens == 0:
        raise DataError("No token of the held-out examples carries loss. Hold out examples that have an answer.")
    return total / tokens, tokens


def heldout_sum(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[Batch], tuple[torch.Tensor, int]],
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[float, int]:
    """Return the loss in nats summed over all tokens that carry loss, and their number.

    As `heldout_loss`, for a model that is run by `forward`: a batch on the device → summed loss and tokens, or whatever
    else a method's losses are a mean over.
    """
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with as_found(model), torch.no_grad(), autocast(device, compute_dtype):
        for batch in batches:
            loss_sum, counted = forward(on_device(batch, device))
            # Sums of many batches in fp32 would depend on their order in the last digits.
            total += loss_sum.double().cpu()
            tokens += counted
    return float(total), tokens


def autocast(device: torch.device, compute_dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which products run in `compute_dtype`; nothing at all for fp32."""
    if compute_dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, compute_dtype)


def on_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """The batch where the model is; the borders of its documents stay on the CPU, where the layout is computed."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and name != "cu_seqlens"
    }
    return replace(batch, **moved)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluate the model in the block, and leave its training flags and its attention as they were."""
    training: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    attention = causal_lm(model).config._attn_implementation
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        if causal_lm(model).config._attn_implementation != attention:
            causal_lm(model).set_attn_implementation(attention)
