"""Adapters on the experts of one mixture answer as plain PEFT does and as merged, wherever its experts are and however they are kept."""

import random
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nightschool.config.recipe import Lora
from nightschool.engine.adapter_experts import AdapterExperts
from nightschool.engine.local_model import LocalModel
from nightschool.engine.model_runner import ModelRunner
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.models.adapters import attach_lora, load_adapter, merge_adapter
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base, locate
from nightschool.models.streamed import ExpertPlace
from nightschool.models.unmerged import LoraWeights, NeedsMerging, read_lora, why_merged
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata
from tests.engine.test_adapters import steps
from tests.engine.test_streamed_experts import answer
from tests.support.adapter_setups import publish_adapter, save_adapter
from tests.support.engine_setups import lively_model, random_prompt
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import base_folder

NUM_EXPERTS = 4
# Ranks that fill rows of 16 bytes and that do not; one reaches one weight of the experts alone.
ADAPTERS = {
    "all": Lora(r=3, alpha=6, target_modules=["attention", "experts"]),
    "both": Lora(r=4, alpha=4, target_modules=["experts"]),
    "down": Lora(r=2, alpha=8, target_modules=["down_proj", "q_proj"]),
}
PROMPTS = [random_prompt(random.Random(seed), 6 + 2 * seed) for seed in range(5)]


def plain_base():
    return AutoModelForCausalLM.from_pretrained(base_folder("tiny-qwen3-moe"), dtype=torch.float32)


def lively(lora, seed):
    wrapped = attach_lora(plain_base(), lora, seed=seed)
    torch.manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return wrapped.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each adapter as PEFT writes it."""
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(lively(lora, seed), place / name, str(base_folder("tiny-qwen3-moe")))
        for seed, (name, lora) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


def base(home, label, tier):
    place = None if tier is None else ExpertPlace(tier, home.path, 3, learns=False)
    ref = str(base_folder("tiny-qwen3-moe")) + (f"[{label}]" if label else "")
    return load_base(ref, home, merge=False, experts=place).model.eval()


def last_logits(model):
    with torch.inference_mode():
        return torch.stack(
            [model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1] for prompt in PROMPTS]
        )


@pytest.mark.parametrize(("label", "tier"), [(None, None), (None, "disk"), ("nf4-double", None), ("int8", "disk")])
def test_every_row_of_a_step_gets_the_logits_of_its_own_adapter(label, tier, home, folders):
    if label is not None and find_spec("bitsandbytes") is None:
        pytest.skip("the extra `qlora` is not installed")
    runner = ModelRunner(base(home, label, tier))
    numbers = {name: runner.add_adapter(read_lora(folder)) for name, folder in folders.items()}
    found = steps(runner, PROMPTS, [numbers["all"], 0, numbers["down"], numbers["both"], numbers["all"]])
    alone = last_logits(base(home, label, tier))
    by_peft = {}
    for name, folder in folders.items():
        if label is None:
            by_peft[name] = last_logits(PeftModel.from_pretrained(plain_base(), str(folder)).eval())
        else:
            by_peft[name] = last_logits(load_adapter(base(home, label, tier), folder, trainable=False))
    assert (by_peft["down"] - alone).abs().max() > 1e-2, "or nothing was compared"
    for place, name in enumerate(["all", None, "down", "both", "all"]):
        wanted = (alone if name is None else by_peft[name])[place]
        torch.testing.assert_close(found[place], wanted, rtol=1e-3, atol=1e-4, msg=str(name))
    for name in folders:
        gone = runner.remove_adapter(numbers[name])
        assert gone.experts.keys() == read_lora(folders[name]).experts.keys()
        numbers[name] = runner.add_adapter(gone)
    again = steps(runner, PROMPTS, [numbers["both"]] * len(PROMPTS))
    torch.testing.assert_close(again, by_peft["both"], rtol=1e-3, atol=1e-4)
    for number in numbers.values():
        runner.remove_adapter(number)
    assert not any(isinstance(module, AdapterExperts) for module in runner._model.modules())


def test_unmerged_is_merged_up_to_rounding(home, folders):
    merged = last_logits(merge_adapter(load_adapter(plain_base(), folders["all"], trainable=False)))
    runner = ModelRunner(base(home, None, None))
    found = steps(runner, PROMPTS, [runner.add_adapter(read_lora(folders["all"]))] * len(PROMPTS))
    torch.testing.assert_close(found, merged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("resident", [None, 3])
def test_tenants_share_one_base_also_where_few_of_its_experts_are_in_memory(resident, tmp_path):
    home = Home(tmp_path).ensure()
    registry = Registry(home)
    published = registry.publish(
        "moe", lambda folder: save_version_folder(plain_base(), byte_tokenizer(), folder), VersionMetadata()
    )
    for seed, name in enumerate(("all", "both")):
        publish_adapter(registry, lively(ADAPTERS[name], seed), published, name=f"of-{name}")
    pool = EnginePool(home, experts_resident=resident, prefix_cache=False)
    slots = [Slot(f"of-{name}", pool) for name in ("all", "both")]
    for slot in slots:
        slot.swap(registry.versions(slot.name)[0].ref)
    engines = {slot.current.engine for slot in slots}
    assert [engine.base for engine in engines] == [published.ref], "neither is merged, and the base is there once"
    first, second = (answer(slot) for slot in slots)
    assert first != pytest.approx(second, abs=1e-2)
    # Whoever reads losses puts the adapter onto the same weights, and takes it off again.
    local = LocalModel(home, locate(registry.versions("of-all")[0].ref, home), pool=pool)
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        logits = local.loaded.model(input_ids=ids).logits
    local.close()
    with torch.inference_mode():
        plain = lively(ADAPTERS["all"], 0)(input_ids=ids).logits
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)
        base_again = engines.pop().loaded.model(input_ids=ids).logits
        torch.testing.assert_close(base_again, plain_base()(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    assert answer(slots[0]) == pytest.approx(first, abs=1e-3)
    for slot in slots:
        slot.close()


def test_what_cannot_stand_apart_is_told_why(folders, tmp_path):
    dense = ModelRunner(lively_model("tiny-llama"))
    with pytest.raises(NeedsMerging, match=r"its layer model\.layers\.0\.mlp\.experts is not in the base"):
        dense.add_adapter(read_lora(folders["both"]))
    few = {
        path: tuple((down[:3], up[:3]) for down, up in pairs)
        for path, pairs in read_lora(folders["both"]).experts.items()
    }
    with pytest.raises(NeedsMerging, match=r"its factors of model\.layers\.0\.mlp\.experts make \[3, "):
        ModelRunner(plain_base()).add_adapter(LoraWeights({}, few))
    router = lively(Lora(r=2, target_modules=["gate"]), 0)
    assert why_merged(save_adapter(router, tmp_path, "base")) == "its target_parameters has gate.weight"
