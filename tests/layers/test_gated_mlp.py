"""Gated feed-forward layers that compute their activation twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from nightschool.layers.gated_mlp import recompute_gates

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _kept_bytes_and_gradients(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(2 * 9).view(2, 9)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return sum(kept.values()), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("config", "architecture"), [(LlamaConfig, LlamaForCausalLM), (GemmaConfig, GemmaForCausalLM)])
def test_gradients_stay_the_same_to_the_bit_and_one_tensor_a_layer_is_not_kept(config: Any, architecture: Any) -> None:
    model = architecture(config(**SIZES))
    kept, expected = _kept_bytes_and_gradients(model)

    assert recompute_gates(model) == 2
    kept_now, found = _kept_bytes_and_gradients(model)

    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert kept - kept_now >= 2 * (2 * 9 * 48 * 4)


def test_two_passes_at_once_are_refused_and_not_mixed_up() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    recompute_gates(model)
    ids = torch.arange(9).view(1, 9)
    first = model(ids, labels=ids).loss
    model(ids + 1, labels=ids)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_a_layer_of_another_kind_stays() -> None:
    assert recompute_gates(Phi3ForCausalLM(Phi3Config(**SIZES))) == 0


def test_a_layer_that_computes_something_else_from_the_same_parts_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)
            return out

    model = nn.Sequential(Scaled())

    assert recompute_gates(model) == 0
    assert type(model[0]) is Scaled
