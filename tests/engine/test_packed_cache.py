"""Packed weights on disk: found again, never taken for others, never in the way, never without end."""

import logging
import os

import pytest
import torch
from torch import nn

from nightschool.engine import kernels, packed_cache, weights
from nightschool.engine.packing import as_packed, pack
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.engine.weights import PLAIN, lay_out
from nightschool.models.export import save_version_folder
from nightschool.store.atomic import own_partial
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata
from tests.support.engine_setups import ask, greedy, lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="this CPU has no kernels for packed weights")


@pytest.fixture(autouse=True)
def _packed_wherever_it_can_be(monkeypatch):
    monkeypatch.setattr(weights, "_MEASURED", {})
    monkeypatch.setattr(weights, "_LEAST_NUMBERS", 1)
    monkeypatch.setattr(
        weights,
        "_fastest_with",
        lambda rows, shapes, others, contestants: next(
            (name for name in contestants if name in ("bf16", "8-bit")), PLAIN
        ),
    )


@pytest.fixture
def packings(monkeypatch):
    """The weights that are packed from now on."""
    seen = []

    def packing(weight):
        seen.append(weight)
        return pack(weight)

    monkeypatch.setattr(weights, "pack", packing)
    return seen


def model(seed=0, out=600):
    torch.manual_seed(seed)
    layers = {"wide": nn.Linear(128, out, bias=False), "head": nn.Linear(608, 320, bias=False)}
    return nn.ModuleDict(layers).bfloat16().float()


def answers_as(model, expected):
    with torch.inference_mode():
        for name, layer in model.items():
            x = torch.randn(2, layer.weight.shape[1])
            assert torch.allclose(layer(x), expected[name](x), atol=1e-5)


def test_a_second_load_packs_nothing(tmp_path, packings):
    for count in (2, 2):
        layers = model()
        assert lay_out(layers, 1 << 30, packed_folder=tmp_path / "packed") == {"bf16": 2}
        assert len(packings) == count
        answers_as(layers, model())


def test_what_did_not_fit_is_packed_when_it_does(tmp_path, packings):
    assert lay_out(model(), 2 * 128 * 608, packed_folder=tmp_path / "packed") == {"bf16": 1}
    assert lay_out(model(), 1 << 30, packed_folder=tmp_path / "packed") == {"bf16": 2}
    assert len(packings) == 3


@pytest.mark.parametrize("harm", ["altered", "cut", "removed"])
def test_a_broken_file_is_made_anew(tmp_path, packings, caplog, harm):
    lay_out(model(), 1 << 30, packed_folder=tmp_path / "packed")
    path = tmp_path / "packed" / "packed.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content if harm == "altered" else content[: len(content) // 2])
    if harm == "removed":
        path.unlink()
    layers = model()
    lay_out(layers, 1 << 30, packed_folder=tmp_path / "packed")
    assert "packed weights are made anew" in caplog.text
    assert len(packings) == 4
    answers_as(layers, model())
    lay_out(model(), 1 << 30, packed_folder=tmp_path / "packed")
    assert len(packings) == 4


@pytest.mark.parametrize("other", [{"seed": 1}, {"out": 64}])
def test_words_of_other_weights_are_not_taken(tmp_path, other):
    lay_out(model(), 1 << 30, packed_folder=tmp_path / "packed")
    layers = model(**other)
    assert lay_out(layers, 1 << 30, packed_folder=tmp_path / "packed") == {"bf16": 2}
    answers_as(layers, model(**other))


def test_words_of_another_form_are_not_taken():
    """A kernel reads as many as the weights have, and would read what lies behind."""
    weight = model()["wide"].weight
    packed = pack(weight)
    assert as_packed(weight, "bf16", packed.words).shape == (600, 128)
    assert as_packed(weight, "bf16", packed.words[:-1]) is None
    assert as_packed(weight, "8-bit", packed.words) is None
    assert as_packed(weight, "bf17", packed.words) is None


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_cache, "_MOST_MODELS", 2)
    one = {"layer": pack(model()["wide"].weight)}
    folders = [tmp_path / f"{number}-1" for number in range(3)]
    for age, folder in enumerate(folders[:2]):
        packed_cache.write(folder, one)
        os.utime(folder, (age, age))
    assert packed_cache.read(folders[0])["layer"][0] == "bf16"
    packed_cache.write(folders[2], one)
    assert [folder.is_dir() for folder in folders] == [True, False, True]


def test_a_folder_that_somebody_else_writes_is_left_to_them(tmp_path, packings, caplog):
    folder = tmp_path / "packed"
    with own_partial(folder), caplog.at_level(logging.WARNING, "nightschool.engine"):
        assert lay_out(model(), 1 << 30, packed_folder=folder) == {"bf16": 2}
    assert "packed weights are not kept" in caplog.text
    assert not folder.exists()


def test_without_a_place_weights_are_packed_all_the_same(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert lay_out(model(), 1 << 30, packed_folder=tmp_path / "file" / "packed") == {"bf16": 2}


def test_a_version_that_was_served_before_is_not_packed_again(tmp_path, packings):
    home = Home(tmp_path / "home").ensure()
    versions = []
    for seed in (1, 2):
        made = lively_model("tiny-llama", seed=seed).bfloat16().float()
        facts = VersionMetadata(kind="model", base="test", method="full")
        versions.append(
            Registry(home).publish(
                "bot", lambda folder, made=made: save_version_folder(made, byte_tokenizer(), folder), facts
            )
        )
    counts = []
    for version in (versions[0], versions[0], versions[1]):
        slot = Slot("bot", EnginePool(home, num_rows=2))
        slot.swap(version.ref)
        counts.append(len(packings))
        assert ask(slot, [1, 2, 3], 8).result(60).token_ids == greedy(slot.current.engine.loaded.model, [1, 2, 3], 8)
        slot.close()
    assert 0 < counts[0] == counts[1] < counts[2], "other weights are packed on their own"
