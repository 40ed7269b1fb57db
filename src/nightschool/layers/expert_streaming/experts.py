"""The module that stands in a layer for its experts, which pass by one after the other, forward and on the way back.

Shapes: T tokens, K active experts of a token, S = T·K rows sorted by expert, D width of the model, E of an expert.

What is computed, and in which order, is what transformers' `grouped_mm` computes, so that the numbers are the same bit by bit on
a CPU: one product for each expert and matrix. For the way back the rows, the first product and its gate's SiLU are kept; there, what is made of them is kept, too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nightschool.layers.expert_streaming.record import GRADIENT, WEIGHTS
from nightschool.layers.expert_streaming.stream import ExpertStream


class StreamedExperts(nn.Module):
    """The SwiGLU experts of one layer; they have no parameters here, they lie in the stream."""

    def __init__(self, stream: ExpertStream, layer: int) -> None:
        super().__init__()
        self.stream, self.layer = stream, layer
        self.num_experts = stream.shape.num_experts

    @property
    def num_elements(self) -> int:
        """Weights of all experts of the layer."""
        return self.num_experts * self.stream.shape.numbers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T,D] of rows [T,D], the chosen experts [T,K] and their weights [T,K]."""
        if self.stream.instead is not None:
            return self.stream.instead(self, hidden_states, top_k_index, top_k_weights)
        order = Order(top_k_index, self.num_experts)
        rows_sd = hidden_states[order.tokens_s].to(self.stream.content.dtype)
        if torch.is_grad_enabled() and self.stream.learns and not rows_sd.requires_grad:
            rows_sd.requires_grad_()  # experts learn also where nothing below them does
        out_sd = cast(Tensor, _Experts.apply(rows_sd, self, order.counts))  # type: ignore[no-untyped-call]
        return order.combine(out_sd, top_k_weights, hidden_states.dtype)


class Order:
    """Rows of a micro-batch in the order of their experts: `order_s` has the places in [T·K], `tokens_s` those in [T]."""

    def __init__(self, top_k_index: Tensor, num_experts: int) -> None:
        self._shape = top_k_index.shape
        experts_s, self.order_s = torch.sort(top_k_index.reshape(-1))
        self.tokens_s = self.order_s // self._shape[1]
        self.counts: list[int] = torch.bincount(experts_s, minlength=num_experts).tolist()

    def combine(self, out_sd: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The weighted sum of what the experts of each token say: [T,D]."""
        weighted_sd = out_sd * top_k_weights.reshape(-1)[self.order_s].unsqueeze(-1)
        back_s = torch.empty_like(self.order_s)
        back_s[self.order_s] = torch.arange(len(self.order_s), device=self.order_s.device)
        return weighted_sd[back_s].view(*self._shape, -1).sum(dim=1).to(dtype)


class _Experts(torch.autograd.Function):
    """Rows through their experts."""

    @staticmethod
    def forward(ctx: Any, rows_sd: Tensor, experts: StreamedExperts, counts: list[int]) -> Tensor:
        stream, size = experts.stream, experts.stream.shape.expert_size
        keeps = ctx.needs_input_grad[0]
        # Without a way back, each expert's products take the place of those of the one before.
        num_rows, kept = (len(rows_sd), counts) if keeps else (max(counts), None)
        gate_up_s, silu_se = rows_sd.new_empty(num_rows, 2 * size), rows_sd.new_empty(num_rows, size)
        out_sd = torch.empty_like(rows_sd)
        # All cuts at once: one by one they would take a tenth of the time of a small product.
        rows, outs = rows_sd.split_with_sizes(counts), out_sd.split_with_sizes(counts)
        boths = gate_up_s.split_with_sizes(kept) if kept else [gate_up_s[:count] for count in counts]
        silus = silu_se.split_with_sizes(kept) if kept else [silu_se[:count] for count in counts]
        products_me = rows_sd.new_empty(max(counts), size)
        with torch.autocast(rows_sd.device.type, enabled=False):
            for expert, record in stream.current(experts.layer, _busy(counts)):
                gate_up, down = on_device(rows_sd.device, record.matrices(WEIGHTS))
                gate, up = torch.mm(rows[expert], gate_up.T, out=boths[expert]).chunk(2, dim=-1)
                silu = torch.ops.aten.silu.out(gate, out=silus[expert])
                product = torch.mul(silu, up, out=products_me[: counts[expert]])
                torch.mm(product, down.T, out=outs[expert])
        if keeps:
            ctx.save_for_backward(rows_sd, gate_up_s, silu_se)
            ctx.experts, ctx.counts = experts, counts
        return out_sd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sd: Tensor) -> tuple[Tensor, None, None]:
        rows_sd, gate_up_s, silu_se = ctx.saved_tensors
        experts: StreamedExperts = ctx.experts
        stream = experts.stream
        grad_rows_sd = torch.empty_like(rows_sd)
        tensors = (rows_sd, gate_up_s, silu_se, grad_sd, grad_rows_sd)
        # One place for what is found of each expert in turn: sizes that differ with every step would leave holes in the heap.
        widest, size = max(ctx.counts), stream.shape.expert_size
        products_me, grad_products_me = rows_sd.new_empty(widest, size), rows_sd.new_empty(widest, size)
        grad_both_mf = rows_sd.new_empty(widest, 2 * size)
        parts = list(zip(*(tensor.split_with_sizes(ctx.counts) for tensor in tensors), strict=True))
        with torch.autocast(rows_sd.device.type, enabled=False):
            for expert, record, has_gradient in stream.backward(experts.layer, _busy(ctx.counts)):
                gate_up, down = on_device(rows_sd.device, record.matrices(WEIGHTS))
                rows, both, silu, grad, grad_rows = parts[expert]
                gate, up = both.chunk(2, dim=-1)
                count = ctx.counts[expert]
                grad_product = torch.mm(grad, down, out=grad_products_me[:count])
                grad_both = grad_both_mf[:count]
                grad_gate, grad_up = grad_both.chunk(2, dim=-1)
                torch.mul(grad_product, silu, out=grad_up)
                torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
                torch.mm(grad_both, gate_up, out=grad_rows)
                if stream.learns:
                    of_gate_up, of_down = record.matrices(GRADIENT)
                    add_product(of_gate_up, grad_both.T, rows, add=has_gradient)
                    add_product(of_down, grad.T, torch.mul(silu, up, out=products_me[:count]), add=has_gradient)
        return grad_rows_sd, None, None


def on_device(device: torch.device, matrices: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices of an expert where they are computed with."""
    return matrices if matrices[0].device == device else (matrices[0].to(device), matrices[1].to(device))


def add_product(into: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Let `into`, wherever it lies, be the product, or the sum with it."""
    if add:
        into.add_((left @ right).to(into.device))
    elif into.device == left.device:
        torch.mm(left, right, out=into)
    else:
        into.copy_(left @ right)


def _busy(counts: list[int]) -> list[int]:
    """The experts that have rows."""
    return [expert for expert, count in enumerate(counts) if count]
