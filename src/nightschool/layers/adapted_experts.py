"""Experts of a stock mixture with adapters beside them: what an adapter adds is computed from its factors, for the tokens that are there.

PEFT's own way adds the product of the factors to the weights of all experts, in each pass: a second copy of them that is kept
until the backward pass, and a gradient as large.

Shapes: T tokens, K active experts of each, S = T · K pairs in the order of their experts, N experts, D width, E width of an
expert, r rank; `ends_n` says up to which pair each expert goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn

# Rows of matrices that are multiplied in groups are whole multiples of so many bytes.
_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class ExpertAdapter:
    """The factors of one weight of all experts: `down_nri` [N, r, in], `up_nor` [N, out, r]."""

    down_nri: Tensor
    up_nor: Tensor
    scaling: float

    def add(self, x_si: Tensor, out_so: Tensor, ends_n: Tensor) -> Tensor:
        """Add up(down(x)) · scaling of each pair's expert to `out_so`."""
        dtype = out_so.dtype
        down_nri, up_nor = self.down_nri.to(dtype), self.up_nor.to(dtype)
        missing = -down_nri.shape[1] % (_ALIGNED_BYTES // down_nri.element_size())
        if missing:
            down_nri, up_nor = F.pad(down_nri, (0, 0, 0, missing)), F.pad(up_nor, (0, missing))
        low_sr = grouped_linear(x_si, down_nri, ends_n) * self.scaling
        return out_so.add_(grouped_linear(low_sr, up_nor.contiguous(), ends_n))


def grouped_linear(x_si: Tensor, weight_noi: Tensor, ends_n: Tensor) -> Tensor:
    """X Wᵀ with the weight [out, in] of each pair's expert, in the format of the weights: [S, out]."""
    return F.grouped_mm(x_si.to(weight_noi.dtype), weight_noi.transpose(-2, -1), offs=ends_n)


def can_be_adapted(experts: nn.Module) -> bool:
    """Whether these are gated experts in the usual layout of transformers: `gate_up_proj` [N, 2E, D], `down_proj` [N, D, E]."""
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


def adapted_experts(
    experts: Any, adapters: Mapping[str, ExpertAdapter], hidden_td: Tensor, chosen_tk: Tensor, scores_tk: Tensor
) -> Tensor:
    """What the experts give, [T, D]: as transformers' own `grouped_mm`, bit for bit, where no adapter adds anything.

    Where experts are packed, `packed_gate_up_proj` and `packed_down_proj` beside their codes say how (see `layers.packed_experts`).

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
    x_sd = hidden_td[order_s // num_active]
    inner_se = experts._apply_gate(_product(experts, adapters, "gate_up_proj", x_sd, ends_n))
    out_sd = _product(experts, adapters, "down_proj", inner_se, ends_n) * scores_tk.reshape(-1)[order_s, None]
    place_s = torch.empty_like(order_s)
    place_s[order_s] = torch.arange(len(order_s), device=order_s.device)
    return out_sd[place_s].view(num_tokens, num_active, -1).sum(dim=1).to(hidden_td.dtype)


def _product(experts: Any, adapters: Mapping[str, ExpertAdapter], name: str, x_si: Tensor, ends_n: Tensor) -> Tensor:
    weight, packed = getattr(experts, name), getattr(experts, f"packed_{name}", None)
    out_so = grouped_linear(x_si, weight, ends_n) if packed is None else packed.linear(x_si, weight, ends_n)
    adapter = adapters.get(name)
    return out_so if adapter is None else adapter.add(x_si, out_so, ends_n)
