"""A model from elsewhere becomes the first version of a name, and its champion."""

import pytest
import torch

from nightschool.config.recipe import Lora
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, Damaged, NameRefused, NotFound, UsageError
from nightschool.models.adapters import attach_lora
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.training.add_model import add_model, name_for
from tests.support.engine_setups import lively_model
from tests.support.gguf_files import make_gguf
from tests.support.tokenizers_for_tests import byte_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def make_folder(path, *, seed=1):
    model = lively_model(seed=seed)
    save_version_folder(model, byte_tokenizer(), path)
    return model


def test_a_folder_becomes_the_champion_and_is_served(tmp_path, home):
    model = make_folder(tmp_path / "there")
    added = add_model(home, "bot", str(tmp_path / "there"), by="me")
    version = added.version
    assert added.is_new
    assert Registry(home).resolve("bot") == added.champion == version
    assert [(move.action, move.by) for move in Registry(home).history("bot")] == [("promote", "me")]
    facts = version.facts
    assert (facts.method, facts.kind, facts.base) == ("import", "model", str(tmp_path / "there"))
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert facts.probes
    loaded = load_base(version.ref, home)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))
    slot = Slot("bot", EnginePool(home))
    try:
        assert slot.refresh()  # verified, loaded, and it answers its probes
    finally:
        slot.close()


def test_a_file_of_16_bits_becomes_a_version_of_16_bits(tmp_path, home):
    make_gguf(tmp_path / "m.gguf", "qwen2", quantisation="BF16")
    version = add_model(home, "bot", "m.gguf", by="me", root=tmp_path).version
    assert version.facts.dtype == "bfloat16"
    assert load_base(version.ref, home).model.config.model_type == "qwen2"


def test_the_same_files_again_change_nothing_and_others_are_refused(tmp_path, home):
    make_folder(tmp_path / "one")
    make_folder(tmp_path / "two", seed=2)
    first = add_model(home, "bot", str(tmp_path / "one"), by="me")
    again = add_model(home, "bot", str(tmp_path / "one"), by="me")
    assert not again.is_new
    assert again.version == first.version
    with pytest.raises(Conflict, match="has versions of another origin already"):
        add_model(home, "bot", str(tmp_path / "two"), by="me")
    assert len(Registry(home).versions("bot")) == 1


def test_what_was_cut_off_before_its_promotion_is_promoted_the_next_time(tmp_path, home, monkeypatch):
    make_folder(tmp_path / "there")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nightschool.training.add_model.promote", killed)
        with pytest.raises(KeyboardInterrupt):
            add_model(home, "bot", str(tmp_path / "there"), by="me")
    added = add_model(home, "bot", str(tmp_path / "there"), by="me")
    assert not added.is_new
    assert added.champion == added.version


def test_an_adapter_is_added_on_its_base(tmp_path, home):
    make_folder(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), home)
    wrapped = attach_lora(base.model, Lora(r=2, alpha=4), seed=0, base_path=base.base_location)
    save_version_folder(wrapped, byte_tokenizer(), tmp_path / "adapter", base_path=base.base_location)
    version = add_model(home, "bot", str(tmp_path / "adapter"), by="me").version
    assert (version.facts.kind, version.facts.base) == ("adapter", str(tmp_path / "base"))
    assert load_base(version.ref, home).adapter is False  # merged, as it is served


@pytest.mark.parametrize(
    ("name", "source", "error"),
    [
        ("../up", "there", NameRefused),
        ("bot", "new:tiny", UsageError),
        ("bot", "other@champion", UsageError),
        ("bot", "./nowhere", NotFound),
        ("bot", "broken", Damaged),
    ],
)
def test_nothing_is_published_of_what_cannot_be_added(name, source, error, tmp_path, home):
    make_folder(tmp_path / "there")
    make_folder(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(error):
        add_model(home, name, source, by="me", root=tmp_path)
    assert Registry(home).names() == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("./models/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("/srv/My Models/Größe 7/", "gr-e-7"),
    ],
)
def test_a_name_is_made_of_the_last_part(source, name):
    assert name_for(source) == name
