"""Advertised sizes are counted sizes; expected bytes and operations bracket measured ones."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from nightschool.config.recipe import Lora
from nightschool.models import peak
from nightschool.models.adapters import attach_lora
from nightschool.models.build import PRESETS, build_model
from nightschool.models.cost import TrainingBytes, count_parameters, expected_peak_bytes, flops_per_token


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_add_up_to_numel(preset):
    with torch.device("meta"):  # only shapes are counted, and the largest has more than a billion elements
        model = build_model(preset, 300, 0)
    count = count_parameters(model)
    assert count.total == count.trainable == sum(p.numel() for p in model.parameters())
    kinds = ("embedding", "head", "attention", "feed_forward", "experts", "norms", "adapters", "other")
    assert sum(getattr(count, kind) for kind in kinds) == count.total
    assert (count.head == 0) == model.config.tie_word_embeddings
    assert count.embedding == 300 * model.config.hidden_size
    assert count.attention > 0
    assert count.norms > 0
    assert count.adapters == count.other == 0


@pytest.mark.parametrize(("preset", "share"), [("tiny-qwen3-moe", 2 / 4), ("tiny-mixtral", 2 / 4)])
def test_a_token_passes_through_a_share_of_the_experts(preset, share):
    model = build_model(preset, 300, 0)
    count = count_parameters(model)
    assert count.experts == sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert count.active == count.total - count.experts * (1 - share)


def test_an_adapter_is_counted_apart():
    model = build_model("tiny-llama", 300, 0)
    before = count_parameters(model).total
    count = count_parameters(attach_lora(model, Lora(r=4), seed=0))
    assert count.total == before + count.adapters
    assert count.trainable == count.adapters > 0
    assert count.attention > 0


@pytest.mark.parametrize("preset", ["tiny", "tiny-gpt-neox", "tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_that_torch_counts(preset, training):
    model = build_model(preset, 300, 0)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 300, (1, 64))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        out = model(input_ids=ids, labels=ids, use_cache=False)
        if training:
            out.loss.backward()
    # Eager attention computes all of the square, of which a causal kernel needs half.
    assert counter.get_total_flops() / 64 == pytest.approx(flops_per_token(model, 128, training=training), rel=0.05)


def test_frozen_weights_cost_no_weight_gradient():
    model = build_model("tiny-llama", 300, 0)
    full = flops_per_token(model)
    assert flops_per_token(attach_lora(model, Lora(r=2), seed=0)) == pytest.approx(full * 2 / 3, rel=0.1)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
QWEN2_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("config", "r", "weights_gb", "total_gb"), [(QWEN3_4B, 32, 8.0, 12.4), (QWEN2_7B, 16, 15.2, 20.2)]
)
def test_lora_takes_what_the_guide_and_the_recipe_say(config, r, weights_gb, total_gb):
    """Chats of 4k tokens, activations recomputed, the base in bf16. Nothing is filled: the meta device holds no bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        wrapped = attach_lora(model, Lora(r=r, target_modules=LINEAR), seed=0)
    cost = expected_peak_bytes(wrapped, 4096, gradient_checkpointing=True, compute=torch.bfloat16)
    frozen = sum(2 * p.numel() for p in wrapped.parameters() if not p.requires_grad)
    assert (round(frozen / 1e9, 1), round(cost.total / 1e9, 1)) == (weights_gb, total_gb)


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from nightschool.layers.forward import checkpoint_activations, document_loss, prepare
from nightschool.models.build import build_model
from nightschool.models.cost import expected_peak_bytes
from tests.support.documents import documents_of

def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")) * 1024

warm = build_model("tiny", 2048, 0)
document_loss(warm, prepare(warm), documents_of([8] * 2, 2048))[0].backward()
torch.optim.AdamW(warm.parameters(), fused=True).step()
del warm
before = peak()
for checkpointing in (True, False):
    model = build_model("small", 4096, 0).train()
    if checkpointing:
        checkpoint_activations(model)
    path = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = documents_of([64] * 24, 4096)
    for _ in range(2):
        document_loss(model, path, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(peak() - before, expected_peak_bytes(model, 24 * 64, gradient_checkpointing=checkpointing).total)
    del model, path, optimizer, batch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_expected_bytes_are_within_a_factor_of_two_of_measured_ones(pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(pytestconfig.rootpath)], capture_output=True, text=True, check=True
    )
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (less_measured, less_expected), (measured, expected) = lines
    assert 0.5 < less_expected / less_measured < 2
    assert 0.5 < expected / measured < 2
    assert less_expected < expected
    assert less_measured < measured


def test_expected_bytes_follow_their_causes():
    model = build_model("tiny", 2048, 0)
    base = expected_peak_bytes(model, 1024)
    assert base.parameters == base.gradients == 4 * count_parameters(model).total
    assert base.optimizer == 8 * count_parameters(model).total
    assert expected_peak_bytes(model, 2048).activations == 2 * base.activations
    assert expected_peak_bytes(model, 1024, compute=torch.bfloat16).activations < base.activations
    lora = expected_peak_bytes(attach_lora(model, Lora(r=2), seed=0), 1024)
    assert lora.optimizer < base.optimizer / 10
    assert base.publishing == base.parameters
    assert lora.publishing == 4 * count_parameters(model).adapters


def test_the_peak_is_never_less_than_publishing_takes():
    cost = TrainingBytes(100, gradients=1, optimizer=2, activations=3, logits=4, publishing=50)
    assert cost.total == 150
    assert replace(cost, publishing=9).total == 110


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_only_the_very_gpu_has_the_rate_that_its_maker_states(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(peak, "_measured", lambda *_: -1.0)
    rate, why = peak.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert rate == (-1.0 if teraflops is None else teraflops * 1e12)
    assert ("stated" in why) == (teraflops is not None)
