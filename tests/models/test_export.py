"""What is published is the model that was trained: proven by loading it plainly, for every architecture."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nightschool.config.recipe import Lora
from nightschool.errors import Damaged, DiskFull, ModelError
from nightschool.layers.forward import document_loss, prepare
from nightschool.models.adapters import attach_lora, describe_adapter, load_adapter, merge_adapter
from nightschool.models.build import build_model
from nightschool.models.export import place_for_copy, prove_export, save_version_folder
from nightschool.models.load import load_base
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from tests.support.documents import ARCHITECTURES, documents_of
from tests.support.tokenizers_for_tests import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def train_a_little(model):
    """Two steps, so that nothing is as it was initialised and no adapter is zero."""
    path = prepare(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(2):
        loss, tokens = document_loss(model, path, documents_of((9, 14, 9), VOCAB, seed=seed))
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def base(tmp_path, request):
    architecture = getattr(request, "param", "tiny-qwen3")
    save_version_folder(build_model(architecture, VOCAB, 1), TOKENIZER, tmp_path / "base")
    return load_base(str(tmp_path / "base"), Home(tmp_path / "home"))


every_architecture = pytest.mark.parametrize("base", ARCHITECTURES, indirect=True)


@every_architecture
def test_full_weights_come_back_bit_by_bit_and_give_the_same_logits(base, tmp_path):
    model = train_a_little(base.model)
    save_version_folder(model, TOKENIZER, tmp_path / "out")
    assert prove_export(model, tmp_path / "out", TOKENIZER) == 0.0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
    again = load_base(str(tmp_path / "out"), Home(tmp_path / "home"))
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, model(IDS).logits)


@every_architecture
def test_an_adapter_comes_back_bit_by_bit_and_gives_the_same_logits(base, tmp_path):
    wrapped = attach_lora(base.model, Lora(r=4), seed=3, base_path=str(base.path))
    train_a_little(wrapped)
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out", base_path=base.path)
    assert prove_export(wrapped, tmp_path / "out", TOKENIZER) == 0.0
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(tmp_path / "out")).eval()
    with torch.no_grad():
        expected, ours = plain(input_ids=IDS).logits, wrapped.eval()(input_ids=IDS).logits
    # Of experts, PEFT adds the product of the factors to the weights, and we to what they give.
    of_experts = describe_adapter(wrapped).reached.keys() & {"experts.gate_up_proj"}
    torch.testing.assert_close(
        ours, expected, **({"rtol": 1e-4, "atol": 1e-5} if of_experts else {"rtol": 0, "atol": 0})
    )
    assert not (tmp_path / "out/model.safetensors").exists()


@every_architecture
def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(base, tmp_path):
    wrapped = train_a_little(attach_lora(base.model, Lora(r=4), seed=3, base_path=str(base.path))).eval()
    with torch.no_grad():
        unmerged = wrapped(input_ids=IDS).logits
        merged = merge_adapter(wrapped)
        torch.testing.assert_close(merged(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
    save_version_folder(merged, TOKENIZER, tmp_path / "merged")
    assert prove_export(merged, tmp_path / "merged", TOKENIZER) == 0.0
    assert all(p.requires_grad for p in merged.parameters())


@every_architecture
def test_adapters_start_as_nothing_the_same_for_the_same_seed_and_train_only_themselves(base):
    model = base.model
    with torch.no_grad():
        before = model(IDS).logits
    torch.manual_seed(7)
    state = torch.get_rng_state()
    wrapped = attach_lora(model, Lora(r=4), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(input_ids=IDS).logits, before, rtol=0, atol=0)
    facts = describe_adapter(wrapped)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert facts.num_trainable == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert not any("lm_head" in name or "embed_out" in name for name in facts.modules)
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    train_a_little(wrapped)
    for name, parameter in wrapped.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert (facts.frozen_experts, facts.note) == (0, "")
    mixture = any(p.ndim == 3 for p in frozen.values())
    assert mixture == any("experts" in name for name in facts.modules)


@pytest.mark.parametrize("architecture", ["tiny-qwen3-moe", "tiny-mixtral"])
def test_experts_that_no_adapter_reaches_are_counted(architecture):
    model = build_model(architecture, VOCAB, 1)
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    facts = describe_adapter(attach_lora(model, Lora(r=2, target_modules=["q_proj"]), seed=0))
    assert facts.frozen_experts == experts > 0
    assert f"{experts:,} parameters of experts stay frozen" in facts.note


def test_adapters_of_experts_cannot_drop_out():
    with pytest.raises(ModelError, match=r"lora\.dropout is 0\.1, and adapters of experts cannot drop out"):
        attach_lora(build_model("tiny-mixtral", VOCAB, 1), Lora(r=2, dropout=0.1), seed=0)
    attach_lora(build_model("tiny-llama", VOCAB, 1), Lora(r=2, dropout=0.1), seed=0)


def test_every_adapter_tensor_learns(base):
    wrapped = attach_lora(base.model, Lora(r=4), seed=3)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    train_a_little(wrapped)
    for name, parameter in wrapped.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name


def test_the_same_seed_makes_the_same_adapter_and_another_seed_another(tmp_path):
    def first_matrix(seed):
        wrapped = attach_lora(build_model("tiny-llama", VOCAB, 1), Lora(r=4), seed=seed)
        return next(p for name, p in wrapped.named_parameters() if ".lora_A" in name)

    assert torch.equal(first_matrix(3), first_matrix(3))
    assert not torch.equal(first_matrix(3), first_matrix(4))


def test_an_adapter_can_be_trained_on_from_its_folder(base, tmp_path):
    wrapped = train_a_little(attach_lora(base.model, Lora(r=4), seed=3, base_path=str(base.path)))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out", base_path=base.path)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "out", trainable=True)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in wrapped.named_parameters() if p.requires_grad
    ]
    train_a_little(wrapped)
    train_a_little(again)
    for ours, theirs in zip(wrapped.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_named_target_modules_and_wrong_ones():
    wrapped = attach_lora(build_model("tiny-llama", VOCAB, 1), Lora(r=2, target_modules=["q_proj", "v_proj"]), seed=0)
    assert {name.rsplit(".", 1)[-1] for name in describe_adapter(wrapped).modules} == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match=r"has query, and no module.*names among .*q_proj"):
        attach_lora(build_model("tiny-llama", VOCAB, 1), Lora(target_modules=["query"]), seed=0)


def test_the_head_can_be_adapted_unless_it_is_the_embedding(base, tmp_path):
    model = build_model("tiny-llama", VOCAB, 1)
    wrapped = train_a_little(attach_lora(model, Lora(r=2, target_modules=["q_proj", "lm_head"]), seed=0)).eval()
    assert prepare(wrapped).fused_head
    with torch.no_grad():
        unmerged = wrapped(input_ids=IDS).logits
        torch.testing.assert_close(merge_adapter(wrapped)(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="the head of this model is its embedding"):
        attach_lora(base.model, Lora(r=2, target_modules=["q_proj", "lm_head"]), seed=0)


def test_adapter_versions_are_served_merged_and_trained_apart(base, tmp_path):
    home = Home(tmp_path / "home")
    registry = Registry(home)
    whole = registry.publish("bot", lambda f: save_version_folder(base.model, TOKENIZER, f), VersionMetadata())
    under = load_base(whole.ref, home)
    wrapped = train_a_little(attach_lora(under.model, Lora(r=4), seed=3, base_path=str(under.path)))

    def fill(folder):
        save_version_folder(wrapped, TOKENIZER, folder, base_path=under.path)
        prove_export(wrapped, folder, TOKENIZER)

    version = registry.publish("bot", fill, VersionMetadata(kind="adapter", base=under.ref, method="lora"))
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=IDS).logits
        served = load_base(version.ref, home)
        torch.testing.assert_close(served.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        apart = load_base(version.ref, home, merge=False)
        assert torch.equal(apart.model(input_ids=IDS).logits, expected)
    assert (served.adapter, served.adapter_base, served.path, served.ref) == (False, None, None, version.ref)
    assert (apart.adapter, apart.adapter_base, apart.path, apart.ref) == (True, whole.ref, whole.path, version.ref)
    from_folder = load_base(str(version.path), home)
    with torch.no_grad():
        assert torch.equal(from_folder.model(input_ids=IDS).logits, served.model(input_ids=IDS).logits)


def test_an_adapter_is_proven_on_the_base_in_memory_which_is_left_as_it_was(base, tmp_path, monkeypatch):
    wrapped = train_a_little(attach_lora(base.model, Lora(r=4, dropout=0.1), seed=3, base_path=str(base.path)))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out", base_path=base.path)
    before = {name: (p.clone(), p.requires_grad) for name, p in wrapped.named_parameters()}
    with torch.no_grad():
        logits = wrapped.eval()(input_ids=IDS).logits
    wrapped.train()

    def refuse(*_, **__):
        raise AssertionError("the base was loaded a second time")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert prove_export(wrapped, tmp_path / "out", TOKENIZER) == 0.0
    after = {name: (p, p.requires_grad) for name, p in wrapped.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name][0], after[name][0]) and before[name][1] == after[name][1] for name in before)
    assert wrapped.training
    assert list(wrapped.peft_config) == ["default"]
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t[min(t)].view(-1)[:1].add_(1e-3), r"lost 1 of \d+ tensors"),
        (lambda t: t.pop(max(t)), r"lost 1 of \d+ tensors"),
        (lambda t: t.update({max(t): torch.zeros(3, 3)}), "cannot be loaded by peft"),
    ],
    ids=["changed", "missing", "another shape"],
)
def test_an_adapter_that_is_not_the_trained_one_is_not_published(base, tmp_path, change, complaint):
    wrapped = train_a_little(attach_lora(base.model, Lora(r=4), seed=3, base_path=str(base.path)))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out", base_path=base.path)
    edit(tmp_path / "out", "adapter_model.safetensors", change)
    with pytest.raises(ModelError, match=complaint):
        prove_export(wrapped, tmp_path / "out", TOKENIZER)
    assert list(wrapped.peft_config) == ["default"]


def test_an_adapter_with_another_scale_is_not_published(base, tmp_path):
    wrapped = train_a_little(attach_lora(base.model, Lora(r=4), seed=3, base_path=str(base.path)))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out", base_path=base.path)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not give the logits of the trained model"):
        prove_export(wrapped, tmp_path / "out", TOKENIZER)


@pytest.mark.parametrize(("free", "place"), [(12, "cuda"), (11, "cpu")])
def test_a_copy_that_does_not_fit_beside_goes_to_the_cpu(monkeypatch, free, place):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert place_for_copy(10, torch.device("cuda")).type == place
    assert place_for_copy(10, torch.device("cpu")).type == "cpu"


def edit(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t["model.norm.weight"].add_(1e-3), r"lost 1 of \d+ tensors .*model\.norm\.weight"),
        (lambda t: t.pop("model.norm.weight"), r"missing keys model\.norm\.weight"),
        (lambda t: t["model.embed_tokens.weight"][3].add_(1e-7), r"model\.embed_tokens\.weight"),
    ],
    ids=["changed", "missing", "one word by one bit"],
)
def test_a_folder_that_is_not_the_model_is_not_published(base, tmp_path, change, complaint):
    save_version_folder(base.model, TOKENIZER, tmp_path / "out")
    edit(tmp_path / "out", "model.safetensors", change)
    with pytest.raises(ModelError, match=complaint):
        prove_export(base.model, tmp_path / "out", TOKENIZER)


def test_a_folder_that_cannot_be_loaded_is_not_published(base, tmp_path):
    save_version_folder(base.model, TOKENIZER, tmp_path / "out")
    (tmp_path / "out/model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be loaded by transformers"):
        prove_export(base.model, tmp_path / "out", TOKENIZER)


def test_a_configuration_that_changes_the_logits_is_not_published(base, tmp_path):
    save_version_folder(base.model, TOKENIZER, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not give the logits of the trained model"):
        prove_export(base.model, tmp_path / "out", TOKENIZER)


def test_another_tokenizer_is_not_published(base, tmp_path):
    other = byte_tokenizer()
    other.chat_template = "{{ messages }}"
    save_version_folder(base.model, other, tmp_path / "out")
    with pytest.raises(ModelError, match="another chat template"):
        prove_export(base.model, tmp_path / "out", TOKENIZER)


def test_an_adapter_on_weights_that_lie_nowhere_is_refused(tmp_path):
    wrapped = attach_lora(build_model("tiny-llama", VOCAB, 1), Lora(r=2), seed=0)
    with pytest.raises(ModelError, match=r"lie in no folder.*Publish the base first"):
        save_version_folder(wrapped, TOKENIZER, tmp_path / "out")


def test_a_full_disk_is_told_as_one(base, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(DiskFull, match="There is no room on the disk"):
        save_version_folder(base.model, TOKENIZER, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_a_truncated_adapter_is_refused(base, tmp_path, keep):
    wrapped = attach_lora(base.model, Lora(r=2), seed=0, base_path=str(base.path))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out")
    path = tmp_path / "out/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Damaged, match="cannot be read"):
        load_base(str(tmp_path / "out"), Home(tmp_path / "home"))


def test_an_adapter_that_lacks_a_tensor_is_refused(base, tmp_path):
    wrapped = attach_lora(base.model, Lora(r=2), seed=0, base_path=str(base.path))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out")
    edit(tmp_path / "out", "adapter_model.safetensors", lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(Damaged, match="disagree about 1 tensor"):
        load_base(str(tmp_path / "out"), Home(tmp_path / "home"))


def test_an_adapter_on_another_base_is_refused(base, tmp_path):
    wrapped = attach_lora(base.model, Lora(r=2), seed=0, base_path=str(base.path))
    save_version_folder(wrapped, TOKENIZER, tmp_path / "out")
    with pytest.raises(ModelError, match="does not fit its base"):
        load_adapter(build_model("tiny", VOCAB, 0), tmp_path / "out", trainable=False)


def test_plain_transformers_stops_where_we_stop(base, tmp_path):
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    save_version_folder(base.model, TOKENIZER, tmp_path / "out", stop_ids=[TOKENIZER.eos_token_id, start])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.eos_token_id == [TOKENIZER.eos_token_id, start]
    assert plain.generation_config.pad_token_id == TOKENIZER.pad_token_id
    save_version_folder(base.model, TOKENIZER, tmp_path / "default")
    assert GenerationConfig.from_pretrained(tmp_path / "default").eos_token_id == TOKENIZER.eos_token_id


def test_the_chat_template_is_a_file_of_its_own_and_renders_the_same(base, tmp_path):
    save_version_folder(base.model, TOKENIZER, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == TOKENIZER.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "où? 🙂"}]
    assert again.apply_chat_template(messages, tokenize=False) == TOKENIZER.apply_chat_template(
        messages, tokenize=False
    )


def test_saving_and_proving_leave_the_model_as_it_was(base, tmp_path):
    model = base.model.train()
    prepare(model)
    before = (model.training, model.config._attn_implementation, model.generation_config)
    save_version_folder(model, TOKENIZER, tmp_path / "out")
    prove_export(model, tmp_path / "out", TOKENIZER)
    assert (model.training, model.config._attn_implementation, model.generation_config) == before
    assert "nightschool" not in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_published_in_16_bit(base, tmp_path, dtype):
    model = base.model.to(dtype)
    save_version_folder(model, TOKENIZER, tmp_path / "out")
    prove_export(model, tmp_path / "out", TOKENIZER)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
