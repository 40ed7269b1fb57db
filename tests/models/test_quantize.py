"""Quantised bases: named by their reference, loaded whole, the same codes for ever, and plain again within rounding."""

import pytest
import torch

from nightschool.errors import Damaged, ModelError
from nightschool.models import quantize
from nightschool.models.adapters import load_adapter, merge_adapter
from nightschool.models.cost import count_parameters, expected_peak_bytes
from nightschool.models.load import load_base, locate
from nightschool.models.quantize import dequantized, is_quantized, quantization_of, scales, stored_bytes
from nightschool.models.stored import stored_weights
from nightschool.store.home import Home
from nightschool.store.names import split_quantization
from nightschool.training.checkpoint.full_state import frozen_fingerprint
from tests.support.adapter_setups import lively_adapter, save_adapter
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

LABELS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from nightschool.models.export import save_version_folder

    path = tmp_path_factory.mktemp("base")
    save_version_folder(lively_model("tiny-llama", seed=1), byte_tokenizer(), path)
    return path


def logits(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].float()


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("label", LABELS)
def test_a_reference_says_how_its_base_is_quantised(label, home, folder):
    plain = load_base(str(folder), home)
    loaded = load_base(f"{folder}[{label}]", home)
    assert loaded.ref == loaded.base_ref == f"{folder}[{label}]"
    assert loaded.base_location == str(folder)
    layers = {name for name, module in loaded.model.named_modules() if is_quantized(module)}
    linear = {name for name, module in plain.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert layers == linear - {"lm_head"}
    assert torch.equal(loaded.model.model.embed_tokens.weight, plain.model.model.embed_tokens.weight)
    limit = {"nf4": 0.11, "fp4": 0.14, "int8": 0.01}[label.removesuffix("-double")]
    name = "model.layers.0.mlp.up_proj.weight"
    weight, values = plain.model.get_parameter(name), dequantized(loaded.model, loaded.ref).get_parameter(name)
    assert float((values - weight).detach().norm() / weight.detach().norm()) < limit
    loaded = load_base(f"{folder}[{label}]", home)
    assert count_parameters(loaded.model).total == count_parameters(plain.model).total
    assert 0 < stored_bytes(loaded.model) < (0.9 if label == "int8" else 0.8) * stored_bytes(plain.model)
    assert expected_peak_bytes(loaded.model, 8).parameters == stored_bytes(loaded.model)


def test_what_is_reckoned_before_loading_is_about_what_is_loaded(home, folder):
    for label in ("nf4-double", "int8"):
        reckoned = stored_weights(f"{folder}[{label}]", home).loaded_bytes(torch.float32)
        assert reckoned == pytest.approx(stored_bytes(load_base(f"{folder}[{label}]", home).model), rel=0.1)


@pytest.mark.parametrize("label", LABELS)
def test_asking_a_base_changes_none_of_its_codes(label, home, folder):
    """bitsandbytes packs 4-bit weights anew for some CPUs, which rounds their scales; and of 8 bits it asks otherwise."""
    model = load_base(f"{folder}[{label}]", home).model
    before, codes = frozen_digest(model), [p.detach().clone() for p in model.parameters()]
    model.eval()
    first = logits(model)
    assert frozen_digest(model) == before
    assert all(torch.equal(a, b) for a, b in zip(codes, model.parameters(), strict=True))
    model.train()
    assert torch.equal(logits(model), first)
    again = load_base(f"{folder}[{label}]", home).model
    assert frozen_digest(again) == before


def frozen_digest(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False) if parameter.is_floating_point() else None
    return frozen_fingerprint(model)


def test_another_scale_is_another_base(home, folder):
    model = load_base(f"{folder}[nf4]", home).model
    before = frozen_digest(model)
    layer = next(module for module in model.modules() if is_quantized(module))
    scales(layer)[0].mul_(1.5)
    assert frozen_digest(model) != before


@pytest.mark.parametrize("label", LABELS)
def test_a_quantised_base_can_be_written_as_plain_weights(label, home, folder):
    loaded = load_base(f"{folder}[{label}]", home)
    before = logits(loaded.model)
    plain = dequantized(loaded.model, loaded.ref)
    assert quantization_of(plain) is None
    assert all(type(m) is torch.nn.Linear for m in plain.modules() if isinstance(m, torch.nn.Linear))
    assert difference(logits(plain), before) < 1e-4


def test_plain_weights_that_answer_otherwise_are_refused(home, folder, monkeypatch):
    loaded = load_base(f"{folder}[nf4]", home)
    found = quantize.scales
    monkeypatch.setattr(quantize, "_logits", lambda model, seen=[]: seen.append(1) or torch.ones(3) * len(seen))
    with pytest.raises(ModelError, match="Serve the adapter on its quantised base"):
        dequantized(loaded.model, loaded.ref)
    assert found is scales


@pytest.mark.parametrize("label", ["nf4-double", "int8"])
def test_an_adapter_is_merged_into_what_its_base_stands_for(label, home, folder, tmp_path):
    saved = save_adapter(lively_adapter(), tmp_path / "adapter", str(folder))
    apart = load_base(f"{saved}[{label}]", home, merge=False)
    merged = load_base(f"{saved}[{label}]", home)
    assert apart.base_ref == f"{folder}[{label}]"
    assert quantization_of(apart.model) is not None
    assert quantization_of(merged.model) is None
    assert difference(logits(merged.model), logits(apart.model)) < 1e-4
    # The twin: merged into the base as it was before it was quantised, it is another model.
    other = merge_adapter(load_adapter(load_base(str(folder), home).model, saved, trainable=False))
    assert difference(logits(other), logits(apart.model)) > 1e-3


def test_what_cannot_be_quantised_is_refused(home, folder, monkeypatch):
    with pytest.raises(ModelError, match="Write one of nf4, nf4-double"):
        load_base(f"{folder}[nf5]", home)
    assert locate(f"{folder}[nf4]", home).quantization == "nf4"
    assert split_quantization("name@1[nf4]") == ("name@1", "nf4")
    assert split_quantization("name@1") == ("name@1", None)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"nightschool\[qlora\]"):
        load_base(f"{folder}[nf4]", home)


def test_a_lost_tensor_is_noticed_in_a_quantised_base_too(home, folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(Damaged):
        load_base(f"{broken}[nf4]", home)
