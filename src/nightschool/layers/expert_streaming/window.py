"""The experts of one layer for all micro-batches of a step at once: each expert is loaded once, whoever needs it.

Each micro-batch is multiplied alone, and they add to an expert's gradient one after the other, so that the numbers are those of
micro-batches that pass one after the other, bit by bit on a CPU. Nothing is kept for the way back but what comes in.

Shapes: T tokens of a micro-batch, K active experts of a token, S = T·K rows sorted by expert, M rows of one expert, D width of the
model, E of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nightschool.layers.expert_streaming.experts import Order, StreamedExperts, add_product, on_device
from nightschool.layers.expert_streaming.record import GRADIENT, WEIGHTS


@dataclass(frozen=True)
class Routed:
    """What comes to a layer's experts of one micro-batch: hidden states [T,D], the chosen experts [T,K] and their weights [T,K]."""

    hidden_td: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


@dataclass(frozen=True)
class RoutedGradient:
    """The gradient by `hidden_td` and by `top_k_weights`; `of_output_td` is the one that it was found from."""

    of_output_td: Tensor
    hidden_td: Tensor
    weights_tk: Tensor


@torch.no_grad()
def forward_together(experts: StreamedExperts, parts: Sequence[Routed]) -> list[Tensor]:
    """As `StreamedExperts.forward`, of each micro-batch: [T,D] each."""
    stream = experts.stream
    sorted_parts = [_Sorted(part, experts) for part in parts]
    outs = [part.new_rows() for part in sorted_parts]
    # All cuts at once: one by one they would take as long as a small product.
    of_experts = [part.cut(out_sd) for part, out_sd in zip(sorted_parts, outs, strict=True)]
    device = parts[0].hidden_td.device
    with torch.autocast(device.type, enabled=False):
        for expert, record in stream.current(experts.layer, _busy(sorted_parts)):
            gate_up, down = on_device(device, record.matrices(WEIGHTS))
            for part, outs_of_experts in zip(sorted_parts, of_experts, strict=True):
                if part.counts[expert]:
                    gate, up = torch.mm(part.rows(expert), gate_up.T).chunk(2, dim=-1)
                    torch.mm(torch.nn.functional.silu(gate) * up, down.T, out=outs_of_experts[expert])
    return [part.order.combine(out_sd, part.routed.top_k_weights, part.routed.hidden_td.dtype)
            for part, out_sd in zip(sorted_parts, outs, strict=True)]  # fmt: skip


@torch.no_grad()
def backward_together(
    experts: StreamedExperts, parts: Sequence[Routed], grads: Sequence[Tensor]
) -> list[RoutedGradient]:
    """The gradients of all micro-batches, found from those of what `forward_together` returned; the experts' own go to their records."""
    stream = experts.stream
    works = [_Back(_Sorted(part, experts), grad_td) for part, grad_td in zip(parts, grads, strict=True)]
    device = parts[0].hidden_td.device
    with torch.autocast(device.type, enabled=False):
        for expert, record, has_gradient in stream.backward(experts.layer, _busy([work.part for work in works])):
            gate_up, down = on_device(device, record.matrices(WEIGHTS))
            into = record.matrices(GRADIENT) if stream.learns else None
            for work in works:
                if work.part.counts[expert]:
                    products = work.products(expert, gate_up, down)
                    for of_matrix, (left, right) in zip(into or (), products, strict=False):
                        add_product(of_matrix, left.T, right, add=has_gradient)
                    has_gradient = True
    return [work.found() for work in works]


class _Sorted:
    """One micro-batch, and which of its rows each expert gets."""

    def __init__(self, routed: Routed, experts: StreamedExperts) -> None:
        self.routed, self.dtype = routed, experts.stream.store.layout.dtype
        self.order = Order(routed.top_k_index, experts.num_experts)
        self.counts = self.order.counts
        self._tokens = self.cut(self.order.tokens_s)

    def new_rows(self) -> Tensor:
        return self.routed.hidden_td.new_empty(len(self.order.tokens_s), self.routed.hidden_td.shape[-1], dtype=self.dtype)  # fmt: skip

    def cut(self, tensor_s: Tensor) -> tuple[Tensor, ...]:
        """By expert."""
        return cast(tuple[Tensor, ...], cast(Any, tensor_s).split_with_sizes(self.counts))

    def tokens(self, expert: int) -> Tensor:
        return self._tokens[expert]

    def rows(self, expert: int) -> Tensor:
        """What an expert gets: [M,D]."""
        return self.routed.hidden_td.index_select(0, self.tokens(expert)).to(self.dtype)


class _Back:
    """One micro-batch on its way back."""

    def __init__(self, part: _Sorted, grad_td: Tensor) -> None:
        self.part, self._given_td = part, grad_td
        routed = part.routed
        weights_s = routed.top_k_weights.reshape(-1)[part.order.order_s]
        # As autograd computes: in the dtype of what was weighted.
        self._grad_td = grad_td.to(torch.promote_types(part.dtype, weights_s.dtype))
        self._weights = part.cut(weights_s.unsqueeze(-1))
        self._grad_weights_s = torch.empty_like(weights_s)
        self._grad_weights = part.cut(self._grad_weights_s)
        self._grad_hidden_td = torch.zeros_like(routed.hidden_td)

    def products(self, expert: int, gate_up: Tensor, down: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Note what an expert's rows get; then yield left [M,·] and right [M,·] of which leftᵀ · right is the gradient, of each matrix."""
        tokens, rows = self.part.tokens(expert), self.part.rows(expert)
        both = torch.mm(rows, gate_up.T)
        gate, up = both.chunk(2, dim=-1)
        silu = torch.nn.functional.silu(gate)
        active = silu * up
        of_weighted = self._grad_td.index_select(0, tokens)
        self._grad_weights[expert].copy_((of_weighted * torch.mm(active, down.T)).sum(dim=-1))
        grad = (of_weighted * self._weights[expert]).to(self.part.dtype)
        grad_product = grad @ down
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad_product, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
        self._grad_hidden_td.index_add_(0, tokens, (grad_both @ gate_up).to(self._grad_hidden_td.dtype))
        yield grad_both, rows
        yield grad, active

    def found(self) -> RoutedGradient:
        flat = torch.empty_like(self._grad_weights_s)
        flat[self.part.order.order_s] = self._grad_weights_s
        return RoutedGradient(
            self._given_td, self._grad_hidden_td, flat.view_as(self.part.routed.top_k_weights)
        )  # fmt: skip


def _busy(parts: Sequence[_Sorted]) -> list[int]:
    """The experts that have rows of any of them."""
    return [expert for expert, counts in enumerate(zip(*(part.counts for part in parts), strict=True)) if any(counts)]
