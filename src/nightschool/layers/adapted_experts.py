"""Experts of a stock mixture with adapters beside them: what an adapter adds is computed from its factors, for the tokens that are there.

PEFT's own way adds the product of the factors to the weights of all experts, in each pass: a second copy of them that is kept
until the backward pass, and a gradient as large.

Shapes: T tokens, K active experts of each, S = T · K pairs in the order of their experts, N experts, D width, E width of an
expert, r rank; `ends_n` says up to which pair each expert goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn

from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.expert_streaming.record import WEIGHTS
from nightschool.layers.packed_experts import PackedExperts
from nightschool.layers.passing_experts import Factors, PassingExperts, pass_through

# Rows of matrices that are multiplied in groups are whole multiples of so many bytes.
ALIGNED_BYTES = 16
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def grouped_linear(x_si: Tensor, weight_noi: Tensor, ends_n: Tensor) -> Tensor:
    """Multiply by the transposed weight [out, in] of each pair's expert, in the format of the weights: [S, out]."""
    return F.grouped_mm(x_si.to(weight_noi.dtype), weight_noi.transpose(-2, -1), offs=ends_n)


def can_be_adapted(experts: nn.Module) -> bool:
    """Whether these are gated experts in the usual layout of transformers, `gate_up_proj` [N, 2E, D] and `down_proj` [N, D, E]: all
    of them there, packed, or streamed.
    """
    if isinstance(experts, StreamedExperts):
        return not experts.stream.learns
    kept: Any = experts
    usual = (
        getattr(kept, "has_gate", False)
        and getattr(kept, "is_concatenated", False)
        and not getattr(kept, "is_transposed", True)
        and not getattr(kept, "has_bias", True)
        and not getattr(kept, "has_post_expert_norm", False)
        and hasattr(kept, "_apply_gate")
    )
    if not usual or kept.config._experts_implementation != "grouped_mm":
        return False
    device = kept.down_proj.device
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def weight_shapes(experts: Any) -> dict[str, tuple[int, int, int]]:
    """[N, out, in] of the two weights, by their names, of a module of which `can_be_adapted` is true."""
    if isinstance(experts, StreamedExperts):
        return {name: experts.stream.shape.stacked_shape(which) for which, name in enumerate(EXPERT_WEIGHTS)}
    found = {}
    for name in EXPERT_WEIGHTS:
        packed = getattr(experts, f"packed_{name}", None)
        num_experts, out, width = getattr(experts, name).shape if packed is None else packed.shape
        found[name] = (num_experts, out, width)
    return found


def adapted_experts(
    experts: Any, adapters: Mapping[str, Factors], hidden_td: Tensor, chosen_tk: Tensor, scores_tk: Tensor
) -> Tensor:
    """What the experts give, [T, D]: as transformers' own `grouped_mm`, bit for bit, where no adapter adds anything.

    Args:
        experts: A module of which `can_be_adapted` is true.
        adapters: By the name of the weight.
        hidden_td: The tokens.
        chosen_tk: Their experts' numbers.
        scores_tk: What each expert's output is multiplied by.
    """
    num_tokens, num_active = chosen_tk.shape
    expert_of_s, order_s = torch.sort(chosen_tk.reshape(-1))
    numbers_n = torch.arange(experts.num_experts, device=expert_of_s.device)
    ends_n = torch.searchsorted(expert_of_s, numbers_n, right=True).to(torch.int32)
    token_of_s = order_s // num_active
    passing = passing_experts(experts, hidden_td.device)
    if passing is None:
        x_sd = hidden_td[token_of_s]
        inner_se = experts._apply_gate(_product(experts, adapters, "gate_up_proj", x_sd, ends_n))
        out_sd = _product(experts, adapters, "down_proj", inner_se, ends_n)
    else:
        counts = torch.diff(ends_n, prepend=ends_n.new_zeros(1)).tolist()
        out_sd = pass_through(
            passing, hidden_td, token_of_s, counts, adapters.get("gate_up_proj"), adapters.get("down_proj")
        )
    out_sd = out_sd * scores_tk.reshape(-1)[order_s, None]
    place_s = torch.empty_like(order_s)
    place_s[order_s] = torch.arange(len(order_s), device=order_s.device)
    return out_sd[place_s].view(num_tokens, num_active, -1).sum(dim=1).to(hidden_td.dtype)


def _product(experts: Any, adapters: Mapping[str, Factors], name: str, x_si: Tensor, ends_n: Tensor) -> Tensor:
    out_so = grouped_linear(x_si, getattr(experts, name), ends_n)
    adapter = adapters.get(name)
    if adapter is None:
        return out_so
    down_nri, up_nor = adapter.down_nri.to(out_so.dtype), adapter.up_nor.to(out_so.dtype)
    missing = -down_nri.shape[1] % (ALIGNED_BYTES // down_nri.element_size())
    if missing:
        down_nri, up_nor = F.pad(down_nri, (0, 0, 0, missing)), F.pad(up_nor, (0, missing))
    low_sr = grouped_linear(x_si, down_nri, ends_n) * adapter.scaling
    return out_so.add_(grouped_linear(low_sr, up_nor.contiguous(), ends_n))


def passing_experts(experts: Any, device: torch.device) -> PassingExperts | None:
    """Experts that are there one at a time; None for those that are all there."""
    if isinstance(experts, StreamedExperts):
        return _Streamed(experts, device)
    packed = getattr(experts, "packed_gate_up_proj", None)
    return _Packed(experts) if isinstance(packed, PackedExperts) else None


class _Packed:
    """Experts whose codes lie in their weights' places, and `packed_…` beside them says how (see `layers.packed_experts`)."""

    def __init__(self, experts: Any) -> None:
        self._experts = experts
        self.dtype: torch.dtype = experts.packed_down_proj.dtype
        self.expert_size: int = experts.packed_down_proj.shape[2]

    def gate(self, both_s: Tensor) -> Tensor:
        return cast(Tensor, self._experts._apply_gate(both_s))

    def walk(self, experts: Sequence[int], *, back: bool) -> Iterator[tuple[int, Tensor, Tensor]]:  # noqa: ARG002 - the same
        kept = self._experts
        gate_up, down = (
            packed.unpacking(codes)
            for packed, codes in (
                (kept.packed_gate_up_proj, kept.gate_up_proj),
                (kept.packed_down_proj, kept.down_proj),
            )
        )
        for expert in experts:
            yield expert, gate_up(expert), down(expert)


class _Streamed:
    """Experts that come from their stream."""

    def __init__(self, experts: StreamedExperts, device: torch.device) -> None:
        self._layer, self._stream, self._device = experts.layer, experts.stream, device
        self.dtype = self._stream.content.dtype
        self.expert_size = self._stream.shape.expert_size

    def gate(self, both_s: Tensor) -> Tensor:
        gate, up = both_s.chunk(2, dim=-1)
        return F.silu(gate) * up

    def walk(self, experts: Sequence[int], *, back: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        stream = self._stream
        passes = stream.backward(self._layer, experts) if back else stream.current(self._layer, experts)
        for expert, record, *_ in passes:
            yield expert, *stream.content.cut(record[WEIGHTS].to(self._device))
