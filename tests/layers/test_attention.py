"""Packed documents are alone: same logits, no gradient from the neighbours, whatever the architecture."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, MambaConfig

from nightschool.errors import ModelError
from nightschool.layers.attention import PACKED_ATTENTION, DocumentLayout, lay_out, packed_arguments, packed_attention
from nightschool.layers.forward import (
    checkpoint_activations,
    document_logits,
    document_loss,
    forward_hidden,
    pad_documents,
    prepare,
    supports_packing,
)
from nightschool.models.build import build_model
from tests.support.documents import ARCHITECTURES, documents_of
from tests.support.training_setups import NUM_THREADS

pytestmark = pytest.mark.trains

VOCAB = 96


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(NUM_THREADS)


def alone(model, batch):
    """Logits of each document by itself under transformers' own attention."""
    model.set_attn_implementation("sdpa")
    bounds = batch.cu_seqlens.tolist()
    parts = [model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits[0] for a, b in itertools.pairwise(bounds)]
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(5,), (7, 7, 7), (3, 60, 9, 9, 1, 41, 10), (50, 2, 49, 48)], ids=str)
def test_a_packed_document_gets_the_logits_that_it_gets_alone(architecture, lengths):
    model = build_model(architecture, VOCAB, seed=1).eval()
    batch = documents_of(lengths, VOCAB)
    path = prepare(model)
    assert path.packed, path.why_padded
    with torch.no_grad():
        packed = document_logits(model, path, batch)
        torch.testing.assert_close(packed, alone(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_gradient_flows_between_packed_documents(architecture):
    model = build_model(architecture, VOCAB, seed=1)
    batch = documents_of((6, 9, 8, 9), VOCAB)
    model.set_attn_implementation(PACKED_ATTENTION)
    layout = lay_out(batch.cu_seqlens)
    arguments = packed_arguments(layout, batch.input_ids, batch.position_ids)
    embedded = model.get_input_embeddings()(arguments.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **arguments).logits[0][layout.restore]
    logits[6:15].square().sum().backward()  # the second document
    gradient = embedded.grad[0][layout.restore]
    assert (gradient[:6] == 0).all()
    assert (gradient[15:] == 0).all()
    assert (gradient[6:15] != 0).any()


def test_a_nan_in_one_document_stays_there():
    model = build_model("tiny-llama", VOCAB, seed=1).eval()
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = documents_of((10, 9, 8, 10), VOCAB)
    layout = lay_out(batch.cu_seqlens)
    assert any(bucket.gather is not None for bucket in layout.buckets), "the case needs a padded bucket"
    arguments = packed_arguments(layout, batch.input_ids, batch.position_ids)
    embedded = model.get_input_embeddings()(arguments.pop("input_ids")).detach()
    embedded[0, layout.restore[10:19]] = float("nan")
    logits = model(inputs_embeds=embedded, **arguments).logits[0][layout.restore]
    assert logits[10:19].isnan().all()
    assert not torch.cat([logits[:10], logits[19:]]).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_both_ways_of_computing_a_bucket_agree_with_an_explicit_mask(dtype, window):
    """fp32 takes the fused kernel, bf16 on a CPU plain products; a window bites from its length on."""
    lengths, heads, groups, channels = (3, 9, 8, 9, 4), 4, 2, 8
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, total, channels, generator=generator)
    k, v = (torch.randn(1, groups, total, channels, generator=generator) for _ in range(2))
    layout = lay_out([0, *torch.tensor(lengths).cumsum(0).tolist()])
    sorted_lengths = sorted(lengths)
    out, _ = packed_attention(
        torch.nn.Module(), q.to(dtype), k.to(dtype), v.to(dtype), None, sliding_window=window, document_layout=layout
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(sorted_lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    mask = (owner[:, None] == owner[None, :]) & (distance >= 0) & (distance < (window or total))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_a_layout_holds_every_token_once(lengths):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = lay_out(bounds)
    assert isinstance(layout, DocumentLayout)
    assert sum(bucket.num_documents for bucket in layout.buckets) == len(lengths)
    assert sum(layout.bucket_sizes) == layout.num_tokens == sum(lengths)
    if layout.order is not None:
        assert torch.equal(layout.order[layout.restore], torch.arange(sum(lengths)))
    for bucket in layout.buckets:
        if bucket.gather is not None:
            assert torch.equal(bucket.gather[bucket.scatter], torch.arange(bucket.num_tokens))


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 4, 4], [0, 5, 3]])
def test_boundaries_that_do_not_rise_are_refused(bounds):
    with pytest.raises(ValueError, match="document boundaries rise from 0"):
        lay_out(bounds)


def test_attention_refuses_what_it_would_silently_leave_out():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="does not compute softcap"):
        packed_attention(torch.nn.Module(), q, q, q, None, softcap=30.0)


def test_without_a_layout_it_is_the_attention_of_transformers():
    model = build_model("tiny-qwen3", VOCAB, seed=1).eval()
    ids = documents_of((12,), VOCAB).input_ids.expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(PACKED_ATTENTION)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_give_one_loss_and_one_gradient(architecture):
    model = build_model(architecture, VOCAB, seed=2)
    batch = documents_of((4, 13, 13, 6), VOCAB, untrained=3)
    path = prepare(model)
    packed, tokens = document_loss(model, path, batch)
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    padded_path = type(path)(packed=False, fused_head=False)
    padded, same_tokens = document_loss(model, padded_path, batch)
    padded.backward()
    assert tokens == same_tokens == int((batch.weights > 0).sum())
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_keeps_documents_and_their_labels_together():
    batch = documents_of((2, 5, 3), VOCAB)
    padded = pad_documents(batch, pad_id=7)
    assert padded.input_ids.shape == (3, 5)
    assert padded.attention_mask.sum(1).tolist() == [2, 5, 3]
    assert torch.equal(padded.input_ids[padded.attention_mask.bool()], batch.input_ids[0])
    assert torch.equal(padded.labels[padded.attention_mask.bool()], batch.labels[0])
    assert (padded.input_ids[padded.attention_mask == 0] == 7).all()
    assert (padded.weights[padded.attention_mask == 0] == 0).all()
    assert (padded.labels[padded.attention_mask == 0] == -100).all()


def test_a_model_whose_state_runs_on_is_found_and_padded_with_the_same_loss():
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, expand=1, time_step_rank=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    path = prepare(model)
    assert not path.packed
    assert path.why_padded
    batch = documents_of((4, 13, 6), VOCAB)
    loss, _ = document_loss(model, path, batch)
    logits, bounds = [], batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        logits.append(model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), batch.labels[0], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_to_16_bits_is_no_leak(architecture, seed):
    path = prepare(build_model(architecture, VOCAB, seed=seed).to(torch.bfloat16))
    assert path.packed, path.why_padded


@pytest.mark.filterwarnings("ignore")
def test_a_leak_is_found_in_16_bits_too():
    """Its linear attention runs on into the next document, and nothing but the numbers says so."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = layers | {"model_type": "qwen3_next", "num_key_value_heads": 2, "head_dim": 16}
    path = prepare(build_model(fields, VOCAB, seed=1).to(torch.bfloat16))
    assert not path.packed
    assert "differ by" in path.why_padded


def test_a_model_that_attends_in_chunks_is_padded():
    model = build_model("tiny-llama", VOCAB, seed=0)
    model.config.attention_chunk_size = 8192
    path = prepare(model)
    assert not path.packed
    assert "attends in chunks" in path.why_padded
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_does_not_reach_attention_is_found(monkeypatch):
    model = build_model("tiny-mixtral", VOCAB, seed=0)
    assert supports_packing(model)[0]
    without = lambda *args, sliding_window=None, **kwargs: packed_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, without)
    supported, why = supports_packing(model)
    assert not supported
    assert "differ" in why


def test_learned_positions_are_packed_and_leave_the_model_as_it_was():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0.1)
    model = AutoModelForCausalLM.from_config(config).train()
    before = model.config._attn_implementation
    supported, why = supports_packing(model)
    assert supported, why
    assert model.training
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_come_in_the_order_of_the_batch_and_make_the_logits(architecture):
    model = build_model(architecture, VOCAB, seed=3).eval()
    batch = documents_of((9, 4, 9, 2), VOCAB)
    path = prepare(model)
    with torch.no_grad():
        hidden, head = forward_hidden(model, path, batch)
        torch.testing.assert_close(head(hidden), alone(model, batch), rtol=1e-5, atol=1e-5)
        padded, _ = forward_hidden(model, type(path)(packed=False, fused_head=True), batch)
        torch.testing.assert_close(padded, hidden, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_sees_the_same_layout():
    model = build_model("tiny-qwen3", VOCAB, seed=4).train()
    batch = documents_of((9, 4, 9, 2), VOCAB)
    path = prepare(model)
    document_loss(model, path, batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpoint_activations(model)
    document_loss(model, path, batch)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_an_architecture_that_cannot_recompute_its_activations_is_told_so(monkeypatch):
    model = build_model("tiny-llama", VOCAB, seed=0)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot recompute activations\. Write train\.grad"):
        checkpoint_activations(model)
