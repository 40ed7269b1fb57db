"""Gated feed-forward layers whose activations are computed twice instead of kept.

Shapes: N tokens, D hidden size, F size of the feed-forward layer.

For `down(act(gate(x)) * up(x))` autograd keeps three tensors [N,F]: the gate, its activation and `up(x)`. The activation costs
nothing beside the products, so the backward pass computes it again, by the same operations and so to the same bits. What is kept
lies in a place that each layer has for good: kept among what comes and goes, it would leave holes of the size of half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@runtime_checkable
class WritesInto(Protocol):
    """A linear layer that can write what it gives into a place that is there already."""

    @property
    def out_features(self) -> int: ...

    def write_into(self, x: Tensor, place: Tensor) -> Tensor:
        """The product of x [...,D], in `place` [...,F]."""
        ...

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """Of the product."""
        ...


def recompute_gates(model: nn.Module) -> int:
    """Replace the gated layers of `model` by ones that keep two tensors [N,F] instead of three; returns how many there were.

    A layer that `WritesInto` describes writes its product to where it is kept; that of any other is copied there.

    A pass forward is followed by its pass backward before the next one begins; autograd raises RuntimeError otherwise.
    A layer is replaced if it consists of `gate_proj`, `up_proj`, `down_proj` and `act_fn`, has no parameters of its own, and gives the very
    numbers that its replacement gives for one random input. Any other layer stays.
    """
    gated = [name for name, layer in model.named_modules() if _is_gated(layer)]
    for name in gated:
        model.set_submodule(name, _GatedMLP(model.get_submodule(name)))
    return len(gated)


@torch.no_grad()
def _is_gated(layer: nn.Module) -> bool:
    if {name for name, _ in layer.named_children()} != _PARTS or any(True for _ in layer.parameters(recurse=False)):
        return False
    weight = next(layer.get_submodule("gate_proj").parameters(), None)
    size = getattr(layer.get_submodule("gate_proj"), "in_features", None)
    if weight is None or size is None:
        return False
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.linspace(-1, 1, 3 * size, dtype=dtype, device=weight.device).view(1, 3, size)
    try:
        return torch.equal(layer(x), _GatedMLP(layer)(x))
    except (RuntimeError, TypeError, ValueError):
        return False  # what takes something else is another kind of layer


class _GatedMLP(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            layer.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )
        self._place: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate_proj, up_proj = self.gate_proj, self.up_proj
        if isinstance(gate_proj, WritesInto) and isinstance(up_proj, WritesInto):
            place = self._place_for((*x.shape[:-1], gate_proj.out_features), gate_proj.dtype_of(x), x.device)
            gate, up = (layer.write_into(x, part) for layer, part in zip((gate_proj, up_proj), place, strict=True))
            place[:0].zero_()  # writes nothing, but is an operation in place: so autograd refuses two passes at once
        else:
            gate, up = gate_proj(x), up_proj(x)
            place = self._place_for(gate.shape, gate.dtype, gate.device)
        gated: Tensor = _Gate.apply(gate, up, self.act_fn, place)  # type: ignore[no-untyped-call]
        return cast(Tensor, self.down_proj(gated))

    def _place_for(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for two tensors of that kind [2,…]."""
        wanted = 2 * math.prod(shape)
        place = self._place
        if place is None or place.numel() < wanted or place.dtype != dtype or place.device != device:
            self._place = None  # before there is a second one
            self._place = place = torch.empty(wanted, dtype=dtype, device=device)
        return place[:wanted].view(2, *shape)


class _Gate(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], place: Tensor) -> Tensor:
        ctx.act = act
        for kept, found in zip(place, (gate, up), strict=True):
            if kept.data_ptr() != found.data_ptr():
                kept.copy_(found)
        ctx.save_for_backward(place)
        activated = act(gate)
        # In place, but for activations that give what they got.
        return activated * up if activated.data_ptr() == gate.data_ptr() else activated.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors[0]
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        of_up = grad * activated.detach()
        (of_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return of_gate, of_up, None, None
