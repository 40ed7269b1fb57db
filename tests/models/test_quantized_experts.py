"""Experts in 4 and 8 bits: the codes of bitsandbytes, the products of what they stand for, and few bytes at any moment."""

import pytest
import torch

from nightschool.config.recipe import Lora
from nightschool.models.adapters import attach_lora, describe_adapter, load_adapter
from nightschool.models.build import build_model
from nightschool.models.cost import count_parameters, expert_bytes, stored_bytes_by_kind
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.models.quantize import compute_in, dequantized, stored_bytes
from nightschool.models.quantized_experts import packed_weights
from nightschool.store.home import Home
from nightschool.training.checkpoint.full_state import frozen_fingerprint
from tests.support.tokenizers_for_tests import byte_tokenizer

functional = pytest.importorskip("bitsandbytes.functional", reason="the extra `qlora` is not installed")

IDS = torch.arange(40).view(2, 20)
MIXTURES = ("tiny-qwen3-moe", "tiny-mixtral")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}
    for preset in MIXTURES:
        paths[preset] = tmp_path_factory.mktemp(preset)
        tokenizer = byte_tokenizer()
        save_version_folder(build_model(preset, len(tokenizer), seed=1), tokenizer, paths[preset])
    return paths


@pytest.mark.parametrize("label", ["nf4", "nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("preset", MIXTURES)
def test_each_expert_is_quantised_as_a_linear_layer_of_its_own(preset, label, home, folders):
    plain = load_base(str(folders[preset]), home).model
    model = load_base(f"{folders[preset]}[{label}]", home).model
    packed = list(packed_weights(model))
    assert len(packed) == 4, "two weights in each of two layers"
    for (experts, name, how), whole in zip(packed, (p for p in plain.parameters() if p.ndim == 3), strict=True):
        codes = getattr(experts, name)
        for expert in range(4):
            weight = whole[expert].detach().contiguous()
            if label == "int8":
                limit = 0.01 * weight.norm()
                assert (how.unpack(codes, expert) - weight).norm() < limit
                continue
            theirs, state = functional.quantize_4bit(
                weight, quant_type=label[:3], compress_statistics=label.endswith("double")
            )
            assert torch.equal(codes[expert], theirs.flatten())
            assert torch.equal(how.unpack(codes, expert), functional.dequantize_4bit(theirs, state))
    assert count_parameters(model.requires_grad_(False)) == count_parameters(plain.requires_grad_(False))
    kinds, before = stored_bytes_by_kind(model), stored_bytes_by_kind(plain)
    assert sum(kinds.values()) == stored_bytes(model)
    assert kinds["experts"] == expert_bytes(model) < before["experts"] * (0.3 if label == "int8" else 0.2)
    assert kinds["embedding"] == before["embedding"]


@pytest.mark.parametrize("label", ["nf4-double", "int8"])
def test_an_adapter_learns_above_codes_what_it_learns_above_what_they_stand_for(label, home, folders, tmp_path):
    ref = f"{folders['tiny-qwen3-moe']}[{label}]"
    wrapped = attach_lora(load_base(ref, home).model, Lora(r=3, alpha=6), seed=0).eval()
    assert describe_adapter(wrapped).reached.keys() >= {"experts.gate_up_proj", "experts.down_proj", "q_proj"}
    before = frozen_fingerprint(wrapped)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_version_folder(wrapped, byte_tokenizer(), tmp_path, base_path=folders["tiny-qwen3-moe"])
    plain = load_adapter(dequantized(load_base(ref, home).model, ref), tmp_path, trainable=True).eval()
    found = []
    for model in (wrapped, plain):
        out = model(IDS, labels=IDS)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
        found.append((out.logits.detach(), gradients))
    (logits, gradients), (expected, their_gradients) = found
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-2, atol=1e-5, msg=name)
    assert frozen_fingerprint(wrapped) == before, "codes and scales stay as they are"


def test_a_scale_of_an_expert_is_part_of_the_fingerprint(home, folders):
    model = load_base(f"{folders['tiny-qwen3-moe']}[nf4]", home).model.requires_grad_(False)
    before = frozen_fingerprint(model)
    _, _, how = next(packed_weights(model))
    how.absmax[0, 0] *= 1.01
    assert frozen_fingerprint(model) != before


def test_products_of_experts_run_in_the_dtype_that_is_asked_for(home, folders):
    model = load_base(f"{folders['tiny-qwen3-moe']}[nf4]", home).model
    expected = model(IDS).logits
    compute_in(model, torch.bfloat16)
    assert {how.unpack(getattr(experts, name), 0).dtype for experts, name, how in packed_weights(model)} == {
        torch.bfloat16
    }
    rounded = model(IDS).logits
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - expected).detach().abs().max() / expected.detach().abs().max()) < 0.1
