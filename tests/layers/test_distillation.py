"""The divergence from a teacher, found chunk by chunk beside the head, is that of all logits at once."""

import pytest
import torch
from torch import nn

from nightschool.layers.distillation import TopTokens, _Divergence, divergence
from nightschool.layers.loss import linear_loss


@pytest.mark.parametrize("kept_tokens", [8, 40])
@pytest.mark.parametrize("chunk", [2, 100])
def test_value_and_gradients_equal_those_over_all_logits(kept_tokens, chunk):
    chance = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 40, dtype=torch.float64)
    hidden_nd = torch.randn(7, 6, generator=chance, dtype=torch.float64, requires_grad=True)
    places_m = torch.tensor([0, 2, 3, 6])
    teacher = TopTokens.of(torch.randn(4, 40, generator=chance) * 2, kept_tokens)
    teacher = TopTokens(teacher.ids, teacher.log_probs.double())
    learns = [hidden_nd, head.weight, head.bias]
    whole = divergence(head(hidden_nd[places_m]), teacher)
    wanted = torch.autograd.grad(whole, learns)
    found = linear_loss(hidden_nd, head, places_m, _Divergence(teacher), chunk)
    # `divergence` takes its softmax in fp32.
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(found * 3, learns), wanted, strict=True):
        assert torch.allclose(one, other * 3, atol=1e-5)
    assert divergence(head(hidden_nd[places_m]), TopTokens.of(head(hidden_nd[places_m]), 8)).item() < 1e-5
