"""Experts above which each token has an adapter of its own, or none: for answers, without a way back.

The experts' products are those of all tokens together. What the adapters add is computed for groups of pairs, each of one expert and
one adapter, by two grouped products.

Shapes: as in `layers.adapted_experts`; G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nightschool.layers.adapted_experts import ALIGNED_BYTES, EXPERT_WEIGHTS, grouped_linear, passing_experts
from nightschool.layers.passing_experts import PassingExperts

# Of one weight of all experts: [N, r, in], and [N, out, r] with the adapter's scale in it.
FactorPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Group:
    """Pairs of one expert and one adapter, from `begin` to `end` in their order; `adapter` is 0 for none."""

    expert: int
    adapter: int
    begin: int
    end: int


@torch.no_grad()
def experts_of_mixed_adapters(
    experts: Any,
    factors: Mapping[str, Mapping[int, FactorPair]],
    adapter_of_t: Tensor,
    hidden_td: Tensor,
    chosen_tk: Tensor,
    scores_tk: Tensor,
) -> Tensor:
    """What the experts give with the adapter of each token, [T, D].

    Args:
        experts: A module of which `can_be_adapted` is true.
        factors: By the name of the weight, of each adapter that reaches it, by its number.
        adapter_of_t: The number of each token's adapter, 0 for none.
        hidden_td: The tokens.
        chosen_tk: Their experts' numbers.
        scores_tk: What each expert's output is multiplied by.
    """
    num_tokens, num_active = chosen_tk.shape
    # Pairs of one expert lie together, and among them those of one adapter.
    num_keys = int(adapter_of_t.max()) + 1
    key_s, order_s = torch.sort((chosen_tk * num_keys + adapter_of_t[:, None]).reshape(-1))
    token_of_s = order_s // num_active
    groups = _groups(key_s, num_keys)
    passing = passing_experts(experts, hidden_td.device)
    with torch.autocast(hidden_td.device.type, enabled=False):
        if passing is None:
            numbers_n = torch.arange(experts.num_experts, device=key_s.device)
            ends_n = torch.searchsorted(key_s // num_keys, numbers_n, right=True).to(torch.int32)
            out_sd = _at_once(experts, factors, hidden_td[token_of_s], ends_n, groups)
        else:
            out_sd = _one_by_one(passing, factors, hidden_td.to(passing.dtype), token_of_s, groups)
    out_sd = out_sd * scores_tk.reshape(-1)[order_s, None]
    place_s = torch.empty_like(order_s)
    place_s[order_s] = torch.arange(len(order_s), device=order_s.device)
    return out_sd[place_s].view(num_tokens, num_active, -1).sum(dim=1).to(hidden_td.dtype)


def _groups(key_s: Tensor, num_keys: int) -> list[_Group]:
    keys, counts = torch.unique_consecutive(key_s, return_counts=True)
    groups, begin = [], 0
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        groups.append(_Group(key // num_keys, key % num_keys, begin, begin + count))
        begin += count
    return groups


def _at_once(
    experts: Any,
    factors: Mapping[str, Mapping[int, FactorPair]],
    x_sd: Tensor,
    ends_n: Tensor,
    groups: Sequence[_Group],
) -> Tensor:
    """Through experts that are all there."""

    def product(name: str, x_si: Tensor) -> Tensor:
        out_so = grouped_linear(x_si, getattr(experts, name), ends_n)
        _add(out_so, x_si, groups, factors[name])
        return out_so

    gate_up, down = EXPERT_WEIGHTS
    return product(down, experts._apply_gate(product(gate_up, x_sd)))


def _one_by_one(
    passing: PassingExperts,
    factors: Mapping[str, Mapping[int, FactorPair]],
    hidden_td: Tensor,
    token_of_s: Tensor,
    groups: Sequence[_Group],
) -> Tensor:
    """Through experts that pass."""
    out_sd = hidden_td.new_empty(len(token_of_s), hidden_td.shape[1])
    of_expert = {expert: list(alike) for expert, alike in groupby(groups, key=lambda group: group.expert)}
    of_gate_up, of_down = (factors[name] for name in EXPERT_WEIGHTS)
    for expert, gate_up, down in passing.walk(list(of_expert), back=False):
        begin, end = of_expert[expert][0].begin, of_expert[expert][-1].end
        here = [_Group(expert, one.adapter, one.begin - begin, one.end - begin) for one in of_expert[expert]]
        x = hidden_td[token_of_s[begin:end]]
        both = x @ gate_up.T
        _add(both, x, here, of_gate_up)
        inner = passing.gate(both)
        out = torch.mm(inner, down.T, out=out_sd[begin:end])
        _add(out, inner, here, of_down)
    return out_sd


def _add(out_so: Tensor, x_si: Tensor, groups: Sequence[_Group], factors: Mapping[int, FactorPair]) -> None:
    """Add to `out_so` what the adapters of these groups give for `x_si`."""
    reached = [group for group in groups if group.adapter in factors]
    if not reached:
        return
    pairs = [factors[group.adapter] for group in reached]
    step = ALIGNED_BYTES // out_so.element_size()
    rank = max(down.shape[1] for down, _ in pairs)
    rank += -rank % step
    down_gri = out_so.new_zeros(len(reached), rank, x_si.shape[1])
    up_gor = out_so.new_zeros(len(reached), out_so.shape[1], rank)
    for place, (group, (down_nri, up_nor)) in enumerate(zip(reached, pairs, strict=True)):
        down_gri[place, : down_nri.shape[1]] = down_nri[group.expert]
        up_gor[place, :, : up_nor.shape[2]] = up_nor[group.expert]
    rows_p = torch.cat([torch.arange(group.begin, group.end) for group in reached]).to(out_so.device)
    ends_g = torch.tensor([group.end - group.begin for group in reached]).cumsum(0).to(out_so.device, torch.int32)
    low_pr = grouped_linear(x_si[rows_p], down_gri, ends_g)
    out_so.index_add_(0, rows_p, grouped_linear(low_pr, up_gor, ends_g).to(out_so.dtype))
