"""Gated feed-forward layers whose activations are computed twice instead of kept.

Shapes: N tokens, D hidden size, F size of the feed-forward layer.

For `down(act(gate(x)) * up(x))` autograd keeps three tensors [N,F]: the gate, its activation and `up(x)`. The activation costs
nothing beside the products, so the backward pass computes it again, by the same operations and so to the same bits. What is kept
lies in a place that each layer has for good: kept among what comes and goes, it would leave holes of the size of half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def recompute_gates(model: nn.Module) -> int:
    """Replace the gated layers of `model` by ones that keep two tensors [N,F] instead of three; returns how many there were.

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
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated: Tensor = _Gate.apply(gate, up, self.act_fn, self._place_for(gate))  # type: ignore[no-untyped-call]
        return cast(Tensor, self.down_proj(gated))

    def _place_for(self, gate: Tensor) -> Tensor:
        """Room for two tensors like this one [2,…]."""
        wanted = 2 * gate.numel()
        place = self._place
        if place is None or place.numel() < wanted or place.dtype != gate.dtype or place.device != gate.device:
            self._place = None  # before there is a second one
            self._place = place = torch.empty(wanted, dtype=gate.dtype, device=gate.device)
        return place[:wanted].view(2, *gate.shape)


class _Gate(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], place: Tensor) -> Tensor:
        ctx.act = act
        place[0].copy_(gate)
        place[1].copy_(up)
        ctx.save_for_backward(place)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors[0]
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            out = ctx.act(gate) * up
        of_gate, of_up = torch.autograd.grad(out, (gate, up), grad)
        return of_gate, of_up, None, None
