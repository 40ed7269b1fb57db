"""The chunked loss is cross-entropy: same value, same gradients, less held at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from nightschool.layers import loss as loss_module
from nightschool.layers.forward import document_loss, prepare
from nightschool.layers.loss import chunked_cross_entropy, cross_entropy_of_parts
from nightschool.models.build import build_model
from tests.support.documents import documents_of
from tests.support.training_setups import NUM_THREADS

pytestmark = pytest.mark.trains

N, D, V = 37, 16, 50


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(NUM_THREADS)


class Wrapped(nn.Module):
    """A head that is not a plain linear layer, as a LoRA-wrapped or quantised one is."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def case(*, bias, dtype=torch.float32, seed=0, shape=(N, D, V)):
    n, d, v = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype, requires_grad=True)
    head = nn.Linear(d, v, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    labels = torch.randint(0, v, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    weights[::3] = 0
    labels[::5] = -100
    return hidden, head, labels, weights


def plain(hidden, head, labels, weights):
    losses = F.cross_entropy(
        head(hidden).float() if hidden.dtype != torch.float64 else head(hidden),
        labels,
        reduction="none",
        ignore_index=-100,
    )
    return (losses * weights * (labels >= 0)).sum()


def gradients(value, hidden, head):
    return torch.autograd.grad(value, [hidden, *head.parameters()])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
def test_value_and_gradients_equal_cross_entropy_over_all_logits(wrapped, bias, chunk):
    hidden, head, labels, weights = case(bias=bias)
    expected = plain(hidden, head, labels, weights)
    value, tokens = chunked_cross_entropy(hidden, Wrapped(head) if wrapped else head, labels, weights, chunk)
    assert tokens == int(((weights > 0) & (labels >= 0)).sum())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(
        gradients(value * 0.25, hidden, head), gradients(expected * 0.25, hidden, head), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tokens_whose_label_is_the_likeliest_are_counted_once_and_change_nothing(wrapped):
    hidden, head, labels, weights = case(bias=True)
    with torch.no_grad():
        labels[: N // 2] = head(hidden).argmax(dim=1)[: N // 2]
    layer, counted = Wrapped(head) if wrapped else head, torch.zeros((), dtype=torch.int64)
    without, _ = chunked_cross_entropy(hidden, layer, labels, weights, 7)
    value, tokens = chunked_cross_entropy(hidden, layer, labels, weights, 7, counted)
    assert torch.equal(value, without)
    for ours, theirs in zip(gradients(value, hidden, head), gradients(without, hidden, head), strict=True):
        assert torch.equal(ours, theirs)
    kept = (weights > 0) & (labels >= 0)
    assert int(counted) == int((head(hidden).argmax(dim=1) == labels)[kept].sum())
    assert 0 < int(counted) < tokens


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_equal_numerical_ones(bias):
    hidden, head, labels, weights = case(bias=bias, dtype=torch.float64, shape=(11, 5, 13))

    def value(hidden, *parameters):
        layer = nn.Linear(5, 13, bias=bias, dtype=torch.float64)
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            delattr(layer, name)
            setattr(layer, name, parameter)
        return chunked_cross_entropy(hidden, layer, labels, weights, 5)[0]

    assert torch.autograd.gradcheck(value, (hidden, *head.parameters()))


def test_a_frozen_head_still_passes_gradients_to_the_hidden_states():
    hidden, head, labels, weights = case(bias=True)
    expected = torch.autograd.grad(plain(hidden, head, labels, weights), hidden)[0]
    head.requires_grad_(False)
    value, _ = chunked_cross_entropy(hidden, head, labels, weights)
    torch.testing.assert_close(torch.autograd.grad(value, hidden)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_batch_in_which_nothing_is_trained_costs_nothing_and_has_zero_gradients(wrapped):
    hidden, head, labels, weights = case(bias=False)
    value, tokens = chunked_cross_entropy(hidden, Wrapped(head) if wrapped else head, labels, weights * 0)
    assert (value.item(), tokens) == (0.0, 0)
    value.backward()
    assert (hidden.grad == 0).all()


def test_untrained_positions_are_never_computed_and_no_more_than_a_chunk_at_once(monkeypatch):
    seen = []

    class Watched(Wrapped):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    hidden, head, labels, weights = case(bias=False)
    with torch.no_grad():
        _, tokens = chunked_cross_entropy(hidden, Watched(head), labels, weights, 4)
    assert max(seen) <= 4
    assert sum(seen) == tokens < N


def test_logits_beyond_the_range_of_exp_are_no_problem():
    hidden, head, labels, weights = case(bias=False)
    with torch.no_grad():
        head.weight.mul_(1e3)
    value, _ = chunked_cross_entropy(hidden, head, labels, weights)
    torch.testing.assert_close(value, plain(hidden, head, labels, weights), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_under_autocast_products_are_bf16_and_the_softmax_is_not(wrapped):
    hidden, head, labels, weights = case(bias=False)
    expected = plain(hidden, head, labels, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = chunked_cross_entropy(hidden, Wrapped(head) if wrapped else head, labels, weights, 5)
        theirs = F.cross_entropy(head(hidden).float(), labels, reduction="none") * weights * (labels >= 0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, theirs.sum(), rtol=1e-5, atol=1e-4)
    for ours, exact in zip(gradients(value, hidden, head), gradients(expected, hidden, head), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() / exact.norm() < 0.02


def test_bf16_parameters_get_bf16_gradients():
    hidden, head, labels, weights = case(bias=True)
    expected = gradients(plain(hidden, head, labels, weights), hidden, head)
    low = hidden.detach().bfloat16().requires_grad_()
    head.bfloat16()
    value, _ = chunked_cross_entropy(low, head, labels, weights)
    for ours, exact in zip(gradients(value, low, head), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() / exact.norm() < 0.03


def test_a_label_outside_the_vocabulary_is_an_error():
    hidden, head, labels, weights = case(bias=False)
    labels[1], weights[1] = V, 1.0
    with pytest.raises((RuntimeError, IndexError)):
        chunked_cross_entropy(hidden, head, labels, weights)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "packed"),
    [(CohereConfig(**SMALL, logit_scale=0.25), True), (Gemma2Config(**SMALL, final_logit_softcapping=0.5), False)],
    ids=["scaled logits", "capped logits and capped scores"],
)
def test_a_model_that_changes_its_logits_is_found_and_trained_on_its_own(config, packed):
    model = AutoModelForCausalLM.from_config(config).eval()
    path = prepare(model)
    assert not path.fused_head
    assert "after the output head" in path.why_own_logits
    assert path.packed == packed, path.why_padded
    batch = documents_of((5, 11, 7), 64)
    likeliest = torch.zeros((), dtype=torch.int64)
    value, tokens = document_loss(model, path, batch, likeliest=likeliest)
    model.set_attn_implementation("eager")
    expected, start, right = 0.0, 0, 0
    for end in batch.cu_seqlens.tolist()[1:]:
        logits = model(input_ids=batch.input_ids[:, start:end]).logits[0]
        expected += (
            F.cross_entropy(logits, batch.labels[0, start:end], reduction="none") * batch.weights[0, start:end]
        ).sum()
        right += int(((logits.argmax(dim=1) == batch.labels[0, start:end]) & (batch.weights[0, start:end] > 0)).sum())
        start = end
    assert (tokens, int(likeliest)) == (int((batch.weights > 0).sum()), right)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    model = build_model("tiny-llama", V, seed=0)
    path, batch = prepare(model), documents_of((5, 11), V)
    with torch.no_grad():
        value, _ = document_loss(model, path, batch)
    assert not value.requires_grad
    torch.testing.assert_close(value, document_loss(model, path, batch)[0].detach())


def test_a_chunk_of_logits_stays_within_its_bytes():
    for vocab_size in (100, 8192, 32_768, 151_936):
        tokens = loss_module.chunk_tokens_for(vocab_size)
        assert 256 <= tokens <= 1024
        assert tokens * vocab_size * 4 <= max(loss_module.CHUNK_BYTES, 256 * vocab_size * 4)


def test_parts_end_to_end_get_what_each_gets_alone():
    """Also beside a part that is not a number."""
    torch.manual_seed(0)
    sizes, head = [5, 1, 9], nn.Linear(6, 11).requires_grad_(False)
    hidden, labels, weights = torch.randn(15, 6), torch.randint(0, 11, (15,)), torch.rand(15).round(decimals=1)
    hidden[5] = float("nan")
    together, counters = hidden.clone().requires_grad_(), torch.zeros(3, dtype=torch.int64)
    sums = cross_entropy_of_parts(together, head, labels, weights, sizes, counters)
    sums.backward(torch.tensor([1.0, 1.0, 0.5]))
    for number, (start, end) in enumerate([(0, 5), (6, 15)]):
        alone, counter = hidden[start:end].clone().requires_grad_(), torch.zeros((), dtype=torch.int64)
        wanted, _ = chunked_cross_entropy(alone, head, labels[start:end], weights[start:end], likeliest=counter)
        (wanted * (1.0, 0.5)[number]).backward()
        torch.testing.assert_close(sums[2 * number], wanted)
        torch.testing.assert_close(together.grad[start:end], alone.grad)
        assert counters[2 * number] == counter
    assert sums[1].isnan()
