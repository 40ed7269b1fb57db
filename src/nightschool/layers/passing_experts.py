"""Frozen experts that are there one at a time, with adapters beside them: packed ones, which are unpacked, or streamed ones.

An expert's two matrices pass once forward and once on the way back. For the way back the tokens and the first product are kept,
and nothing of the experts.

Shapes: S rows in the order of their experts, N experts, D width of the model, E of an expert, r rank. `gate_up` is [2E, D],
`down` [D, E]; the factors of an adapter are [N, r, in] and [N, out, r].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PassingExperts(Protocol):
    """The experts of one layer."""

    @property
    def dtype(self) -> torch.dtype:
        """In which products are computed."""
        ...

    @property
    def expert_size(self) -> int:
        """E."""
        ...

    def gate(self, both_s: Tensor) -> Tensor:
        """What the first product [S, 2E] becomes before the second: [S, E]."""
        ...

    def walk(self, experts: Sequence[int], *, back: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each of these experts with `gate_up` and `down`, which may be looked at until the next one is asked for."""
        ...


@dataclass(frozen=True)
class Factors:
    """Of one matrix of all experts: `down_nri` [N, r, in], `up_nor` [N, out, r]."""

    down_nri: Tensor
    up_nor: Tensor
    scaling: float


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pass_through(
    experts: PassingExperts,
    hidden_td: Tensor,
    token_of_s: Tensor,
    counts: Sequence[int],
    gate_up: Factors | None,
    down: Factors | None,
) -> Tensor:
    """Rows through their experts: [S, D].

    Args:
        experts: Those of the layer.
        hidden_td: The tokens, which are kept for the way back, and not the rows.
        token_of_s: Which token each row is.
        counts: How many rows each expert has.
        gate_up: The adapter of the first matrix.
        down: That of the second.
    """
    dtype = experts.dtype
    tensors = [part for one in (gate_up, down) for part in ((one.down_nri, one.up_nor) if one else (None, None))]
    factors = [None if part is None else part.to(dtype).contiguous() for part in tensors]
    scalings = tuple(0.0 if one is None else one.scaling for one in (gate_up, down))
    arguments = hidden_td.to(dtype), token_of_s, experts, list(counts), scalings
    out: Tensor = _Passing.apply(*arguments, *factors)  # type: ignore[no-untyped-call]
    return out


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_td: Tensor,
        token_of_s: Tensor,
        experts: PassingExperts,
        counts: list[int],
        scalings: tuple[float, float],
        *factors: Tensor | None,
    ) -> Tensor:
        kept = any(ctx.needs_input_grad)
        both_s = hidden_td.new_empty(len(token_of_s), 2 * experts.expert_size) if kept else None
        out_sd = hidden_td.new_empty(len(token_of_s), hidden_td.shape[1])
        first, second = (_Adapter(*one, out_sd) for one in _pairs(factors, factors, scalings))
        places, busy = _places(counts)
        with torch.autocast(hidden_td.device.type, enabled=False):
            for expert, gate_up, down in experts.walk(busy, back=False):
                rows = places[expert]
                x = hidden_td[token_of_s[rows]]
                both = torch.mm(x, gate_up.T, out=None if both_s is None else both_s[rows])
                first.add(both, x, expert, rows)
                inner = experts.gate(both)
                second.add(torch.mm(inner, down.T, out=out_sd[rows]), inner, expert, rows)
        if both_s is not None:
            ctx.save_for_backward(hidden_td, token_of_s, both_s, *factors)
            ctx.experts, ctx.counts, ctx.scalings = experts, counts, scalings
        return out_sd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sd: Tensor) -> tuple[Any, ...]:
        hidden_td, token_of_s, both_s, *factors = ctx.saved_tensors
        experts: PassingExperts = ctx.experts
        grad_sd = grad_sd.to(hidden_td.dtype)
        grads = [None if factor is None else torch.zeros_like(factor) for factor in factors]
        grad_x_sd = torch.empty_like(grad_sd)
        first, second = (_Adapter(*one, grad_x_sd) for one in _pairs(factors, grads, ctx.scalings))
        places, busy = _places(ctx.counts)
        with torch.autocast(hidden_td.device.type, enabled=False):
            for expert, gate_up, down in experts.walk(busy, back=True):
                rows = places[expert]
                grad = grad_sd[rows]
                inner, back_through_gate = _gated(experts, both_s[rows])
                grad_inner = grad @ down
                second.add_back(grad_inner, grad, inner, expert, rows)
                grad_both = back_through_gate(grad_inner)
                grad_x = torch.mm(grad_both, gate_up, out=grad_x_sd[rows])
                first.add_back(grad_x, grad_both, hidden_td[token_of_s[rows]], expert, rows)
        # In the order in which indexing itself would add them up.
        grad_td = torch.zeros_like(hidden_td).index_put_((token_of_s,), grad_x_sd, accumulate=True)
        return grad_td, None, None, None, None, *grads


class _Adapter:
    """Factors of one matrix of all experts, and the gradients of these; there may be none, and then nothing happens.

    What lies between the factors has room for all rows, so that each product begins at the same place as where all are computed
    at once, which decides its last bits.
    """

    def __init__(
        self, factors: Sequence[Tensor | None], grads: Sequence[Tensor | None], scaling: float, rows_sd: Tensor
    ) -> None:
        self._down, self._up = factors
        self._grad_down, self._grad_up = grads
        self._scaling = scaling
        rank = 0 if self._down is None else self._down.shape[1]
        size = len(rows_sd), rank
        self._low_sr, self._grad_low_sr = rows_sd.new_empty(size), rows_sd.new_empty(size)

    def add(self, out: Tensor, x: Tensor, expert: int, rows: slice) -> None:
        """Add up(down(x)) · scaling of an expert, whose rows these are."""
        if self._down is not None and self._up is not None:
            out.add_(self._low(x, self._down[expert], rows) @ self._up[expert].T)

    def add_back(self, grad_x: Tensor, grad: Tensor, x: Tensor, expert: int, rows: slice) -> None:
        """Add what `grad`, that of the output, brings to that of x; the factors get theirs."""
        if self._down is None or self._up is None or self._grad_down is None or self._grad_up is None:
            return
        down = self._down[expert]
        grad_low = torch.mm(grad, self._up[expert], out=self._grad_low_sr[rows]).mul_(self._scaling)
        grad_x.add_(grad_low @ down)
        self._grad_down[expert] = grad_low.T @ x
        self._grad_up[expert] = grad.T @ self._low(x, down, rows)

    def _low(self, x: Tensor, down: Tensor, rows: slice) -> Tensor:
        return torch.mm(x, down.T, out=self._low_sr[rows]).mul_(self._scaling)


def _pairs(factors: Sequence[Any], grads: Sequence[Any], scalings: Sequence[float]) -> list[tuple[Any, Any, float]]:
    """Those of `gate_up` and of `down`."""
    return [(factors[at : at + 2], grads[at : at + 2], scaling) for at, scaling in zip((0, 2), scalings, strict=True)]


def _gated(experts: PassingExperts, both: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gate's output, and what takes a gradient back through it."""
    leaf = both.detach().requires_grad_()
    with torch.enable_grad():
        inner = experts.gate(leaf)

    def back(grad_inner: Tensor) -> Tensor:
        (grad_both,) = torch.autograd.grad(inner, leaf, grad_inner)
        return grad_both

    return inner.detach(), back


def _places(counts: Sequence[int]) -> tuple[list[slice], list[int]]:
    """The rows of each expert, and the experts that have some."""
    places = [slice(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
    return places, [expert for expert, count in enumerate(counts) if count]
