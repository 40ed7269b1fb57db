"""Loading takes every tensor and nothing else, or says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from nightschool.errors import Damaged, ModelError, NotFound
from nightschool.models.build import PRESETS, build_model
from nightschool.models.cost import count_parameters
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.models.stored import stored_weights
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from tests.support.documents import ARCHITECTURES
from tests.support.tokenizers_for_tests import byte_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def folder_of(path, architecture="tiny-qwen3", *, seed=1):
    tokenizer = byte_tokenizer()
    model = build_model(architecture, len(tokenizer), seed=seed, eos_token_id=tokenizer.eos_token_id).eval()
    save_version_folder(model, tokenizer, path)
    return model


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_is_loaded_bit_by_bit(architecture, tmp_path, home):
    model = folder_of(tmp_path / "m", architecture)
    loaded = load_base(str(tmp_path / "m"), home)
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not loaded.model.training
    assert (loaded.context_tokens, loaded.vocab_size, loaded.tokenizer_size) == (256, 259, 259)
    assert (loaded.ref, loaded.path, loaded.adapter) == (str(tmp_path / "m"), tmp_path / "m", False)
    assert loaded.tokenizer.chat_template


def test_a_relative_folder_is_taken_against_the_root(tmp_path, home):
    folder_of(tmp_path / "m")
    assert load_base("./m", home, root=tmp_path).ref == str(tmp_path / "m")


# The larger ones of GPT-NeoX differ from these by numbers alone, and take half a minute each.
BUILT = [preset for preset in PRESETS if not preset.startswith("neox-") or preset in ("neox-tiny", "neox-30m")]


@pytest.mark.parametrize("preset", BUILT)
def test_presets_are_built_the_same_for_the_same_seed_and_leave_the_generator_alone(preset):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = (build_model(preset, 300, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))
    assert count_parameters(a).total == sum(p.numel() for p in a.parameters())


def test_tiny_is_about_a_million_parameters():
    assert 0.9e6 < count_parameters(build_model("new:tiny", 2048, 0)).total < 1.2e6


def test_an_unknown_preset_lists_those_that_there_are(home):
    with pytest.raises(ModelError, match=r"no preset 'huge'\. Presets are tiny, small"):
        load_base("new:huge", home, tokenizer=byte_tokenizer())


def test_a_new_model_takes_the_tokenizer_that_it_is_given(home):
    tokenizer = byte_tokenizer()
    loaded = load_base("new:tiny-llama", home, tokenizer=tokenizer, seed=3)
    assert loaded.vocab_size == len(tokenizer)
    assert loaded.model.config.eos_token_id == tokenizer.eos_token_id
    assert loaded.path is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_base("new:tiny-llama", home)


def publish(home, name, fill, **facts):
    return Registry(home).publish(name, fill, VersionMetadata(**facts))


def test_versions_are_loaded_by_name_alias_and_id(tmp_path, home):
    model = folder_of(tmp_path / "m")
    version = publish(home, "bot", lambda folder: shutil.copytree(tmp_path / "m", folder, dirs_exist_ok=True))
    Registry(home).promote("bot", version.id, by="test")
    for ref in ("bot", "bot@champion", f"bot@{version.id}"):
        loaded = load_base(ref, home)
        assert loaded.ref == loaded.base_ref == version.ref
        assert torch.equal(loaded.model.model.norm.weight, model.model.norm.weight)
    with pytest.raises(NotFound, match=r"There is no 'bot@nobody'"):
        load_base("bot@nobody", home)


def test_a_hub_id_that_is_not_here_says_what_to_do(monkeypatch, home):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(
        NotFound,
        match=r"'nobody/nothing' is not a name of the registry and not on this machine, and HF_HUB_OFFLINE is set.*new:tiny",
    ):
        load_base("nobody/nothing", home)
    with pytest.raises(NotFound, match="a possible hub id"):
        load_base("a b/c?", home)


def test_a_hub_model_is_taken_from_the_cache(tmp_path, monkeypatch, home):
    snapshot = tmp_path / "hub/models--someone--small/snapshots/0123456789012345678901234567890123456789"
    folder_of(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    loaded = load_base("someone/small", home)
    assert (loaded.ref, loaded.base_location, loaded.path) == ("someone/small", "someone/small", snapshot)
    (snapshot / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json was never fetched"):
        load_base("someone/small", home)


def test_a_folder_that_is_not_there(tmp_path, home):
    with pytest.raises(NotFound, match="is not a folder"):
        load_base(str(tmp_path / "nowhere"), home)


def test_a_folder_without_a_configuration(tmp_path, home):
    folder_of(tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_configuration_that_is_no_json_object(text, tmp_path, home):
    folder_of(tmp_path / "m")
    (tmp_path / "m/config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Damaged, match=r"config\.json"):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            BertModel(
                BertConfig(
                    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
                )
            ),
            "BertModel",
        ),
        (
            T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)),
            "T5ForConditionalGeneration",
        ),
        (build_model("tiny-qwen3", 32, 0).model, "Qwen3Model"),
    ],
    ids=["encoder", "encoder and decoder", "no head"],
)
def test_what_is_no_causal_language_model_is_refused(model, named, tmp_path, home):
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=f"is a {named}, which is not a causal language model"):
        load_base(str(tmp_path / "m"), home)


def test_an_encoder_with_a_causal_name_but_eyes_ahead_is_refused(tmp_path, home):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=300
    )
    config.is_decoder = False
    model = BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # fresh weights hardly attend to anything
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="looks ahead"):
        load_base(str(tmp_path / "m"), home)


def test_code_from_a_folder_is_never_run(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_config(tmp_path / "m", model_type="homemade", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        load_base(str(tmp_path / "m"), home)
    assert not (tmp_path / "pwned").exists()


def test_pickles_are_refused(tmp_path, home):
    folder_of(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_base(str(tmp_path / "m"), home)
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="as pickles, which can run code"):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(keep, tmp_path, home):
    folder_of(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Damaged, match="cannot be read"):
        load_base(str(tmp_path / "m"), home)


def test_a_missing_tensor_is_named(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(Damaged, match=r"missing keys model\.norm\.weight"):
        load_base(str(tmp_path / "m"), home)


def test_an_unexpected_tensor_is_named(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update(stranger=torch.ones(3)))
    with pytest.raises(Damaged, match="unexpected keys stranger"):
        load_base(str(tmp_path / "m"), home)


def test_a_tensor_of_another_shape_is_refused(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(Damaged, match=r"model\.norm\.weight|do not belong together"):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_too_many_or_too_few_is_refused(architecture, tmp_path, home):
    folder_of(tmp_path / "m", architecture)
    for layers in (1, 3):
        edit_config(tmp_path / "m", num_hidden_layers=layers, layer_types=None)
        with pytest.raises(Damaged):
            load_base(str(tmp_path / "m"), home)


def test_a_lost_expert_is_found_by_counting(tmp_path, home):
    folder_of(tmp_path / "m", "tiny-mixtral")

    def lose(tensors):
        for name in [name for name in tensors if ".experts.3." in name]:
            del tensors[name]

    edit_weights(tmp_path / "m", lose)
    with pytest.raises(Damaged):
        load_base(str(tmp_path / "m"), home)


def test_weights_that_are_nan_are_refused(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(Damaged, match=r"model\.norm\.weight .*holds NaN"):
        load_base(str(tmp_path / "m"), home)


def test_a_tied_head_that_lies_in_the_file_too_is_accepted(tmp_path, home):
    folder_of(tmp_path / "m")
    edit_weights(
        tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    assert load_base(str(tmp_path / "m"), home).model.config.tie_word_embeddings


def test_buffers_of_old_files_are_not_counted(tmp_path, home):
    folder_of(tmp_path / "m", "tiny-gpt-neox")
    name = "gpt_neox.layers.0.attention.{}"
    old = {name.format("bias"): torch.ones(1, 1, 8, 8), name.format("masked_bias"): torch.tensor(-1e9)}
    edit_weights(tmp_path / "m", lambda tensors: tensors.update(old))
    load_base(str(tmp_path / "m"), home)


def test_a_count_that_does_not_fit_is_found_even_if_transformers_reports_nothing(tmp_path, home, monkeypatch):
    folder_of(tmp_path / "m")
    monkeypatch.setattr("nightschool.models.load.not_loaded", lambda report: "")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update(stranger=torch.ones(3)))
    with pytest.raises(Damaged, match=r"hold [\d,]+ numbers and the model takes [\d,]+"):
        load_base(str(tmp_path / "m"), home)


def test_a_tokenizer_larger_than_the_vocabulary_names_both_numbers(tmp_path, home):
    folder_of(tmp_path / "m")
    byte_tokenizer(extra=5).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="has 264 ids and the model's vocabulary only 259"):
        load_base(str(tmp_path / "m"), home)


def test_a_folder_without_a_tokenizer(tmp_path, home):
    folder_of(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer that can be read"):
        load_base(str(tmp_path / "m"), home)


def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path, home):
    model = folder_of(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    shards = sorted(path.name for path in (tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    load_base(str(tmp_path / "m"), home)
    (tmp_path / "m" / shards[0]).unlink()
    with pytest.raises(Damaged, match=f"{shards[0]} is missing"):
        load_base(str(tmp_path / "m"), home)


def test_shards_outside_the_folder_are_refused(tmp_path, home):
    folder_of(tmp_path / "m")
    shutil.move(tmp_path / "m/model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match="outside its folder"):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_16_bit_loads_in_16_bit(architecture, tmp_path, home):
    folder_of(tmp_path / "m", architecture)
    loaded = load_base(str(tmp_path / "m"), home, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert isinstance(loaded.model, type(AutoModelForCausalLM.from_config(loaded.model.config)))


KERNEL = "kernels-community/flash-attn"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_the_kernels_that_a_config_asks_for_are_not_taken(key, tmp_path, home):
    folder_of(tmp_path / "m")
    edit_config(tmp_path / "m", **{key: KERNEL})
    loaded = load_base(str(tmp_path / "m"), home)
    assert KERNEL not in (loaded.model.config._attn_implementation, loaded.model.config._experts_implementation)
    save_version_folder(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert KERNEL not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_deeply_nested_file_of_a_base_is_named(file, tmp_path, home):
    folder_of(tmp_path / "m")
    (tmp_path / "m" / file).write_text('{"a":' * 20_000 + "1" + "}" * 20_000)
    with pytest.raises((Damaged, ModelError), match=str(tmp_path / "m")):
        load_base(str(tmp_path / "m"), home)


@pytest.mark.parametrize("fields", [{"num_attention_heads": 0}, {"hidden_size": 0}, {"num_hidden_layers": -1}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_configuration_that_cannot_be_built_is_named(fields, architecture, tmp_path, home):
    folder_of(tmp_path / "m", architecture)
    edit_config(tmp_path / "m", **fields)
    with pytest.raises(Damaged, match=str(tmp_path / "m")):
        load_base(str(tmp_path / "m"), home)


def test_a_configuration_that_divides_by_zero_is_named_before_anything_is_loaded(tmp_path, home):
    folder_of(tmp_path / "m", "tiny-llama")
    edit_config(tmp_path / "m", num_attention_heads=0, head_dim=None)
    with pytest.raises(Damaged, match=r"config\.json of the base .* cannot be used: .*zero"):
        stored_weights(str(tmp_path / "m"), home)


def adapter_folder(path, base):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))


@pytest.mark.parametrize("look", [load_base, stored_weights])
def test_an_adapter_that_stands_on_itself_is_refused(look, tmp_path, home):
    for name, base in (("itself", "itself"), ("one", "other"), ("other", "one")):
        adapter_folder(tmp_path / name, str(tmp_path / base))
    for name in ("itself", "one"):
        with pytest.raises(ModelError, match="stands on this adapter itself"):
            look(str(tmp_path / name), home)


def test_a_deeply_nested_adapter_config_is_named(tmp_path, home):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 20_000)
    with pytest.raises(Damaged, match=r"adapter_config\.json"):
        load_base(str(tmp_path / "a"), home)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_file_of_weights_is_no_base_and_is_refused_with_its_sizes(tmp_path, home, capsys):
    """What ExplicitLM saves of its gate: a state dictionary, or one with its configuration."""
    gate = {"query_proj.weight": torch.zeros(1536, 64), "norm.weight": torch.ones(64)}
    for name, whole in (("memory_gate.pth", gate), ("router_only.pt", {"head": gate, "memory_gate_cfg": {"dim": 64}})):
        torch.save(whole, tmp_path / name)
        with pytest.raises(
            ModelError,
            match=r"2 tensors \((head.)?query_proj.weight \[1536, 64\].*projection.a \[rank, H\].*router.yaml",
        ):
            load_base(name, home, root=tmp_path)
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(Damaged, match="Nothing of it was run"):
        load_base(str(tmp_path / "evil.pth"), home)
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(NotFound, match="Check the path"):
        load_base("none.pth", home, root=tmp_path)
