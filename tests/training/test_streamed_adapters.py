"""Adapters above experts that live elsewhere: the same numbers as above resident ones, on any tier, and a version like any other."""

import json
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nightschool.config.recipe import Lora, Recipe
from nightschool.engine.comparison import Comparison
from nightschool.errors import Damaged, ModelError
from nightschool.models.adapters import attach_lora, describe_adapter
from nightschool.models.cost import count_parameters, expert_tiers
from nightschool.models.load import load_base, located_version
from nightschool.models.streamed import ExpertPlace
from nightschool.store.registry import Registry
from nightschool.training.checkpoint.full_state import frozen_fingerprint
from nightschool.training.planning.plan import plan_of
from tests.support.training_setups import MiniRun, base_folder, deterministic_threads, differing
from tests.training.test_resume import assert_equal_runs

LORA = Lora(r=4, alpha=8, target_modules=["attention", "experts"])
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def on(tier, folder, **more):
    return MiniRun(folder, "tiny-qwen3-moe", lora=LORA, recipe={"experts": {"tier": tier, "resident": 2}}, **more)


def test_adapters_of_routers_that_could_not_be_served_are_refused_before_step_1(tmp_path):
    lora = LORA.model_copy(update={"target_modules": ["experts", "gate"]})
    experts = {"experts": {"tier": "disk", "resident": 2}}
    run = MiniRun(tmp_path / "served", "tiny-qwen3-moe", lora=lora, recipe=experts)
    with pytest.raises(ModelError, match=r"expert routers \(.*gate\).*experts\.tier is disk"):
        run.prepared()
    elsewhere = experts | {"serve": {"promote": "never"}}
    MiniRun(tmp_path / "elsewhere", "tiny-qwen3-moe", lora=lora, recipe=elsewhere).prepared()


@pytest.mark.trains
def test_a_run_learns_the_same_on_every_tier_and_goes_on_on_another(tmp_path, capsys):
    resident = on("device", tmp_path / "resident").go()
    assert (
        "Adapter of rank 4 on 12 layers: 2 experts.down_proj, 2 experts.gate_up_proj, 2 k_proj"
        in capsys.readouterr().out
    )
    first = on("disk", tmp_path / "parts").go(stop_after=3)
    first.run.recipe_path.write_text(json.dumps(first.run.recipe() | {"experts": {"tier": "host"}}))
    second = on("host", tmp_path / "parts").go(resume=first.saved[-1], stop_after=4)
    second.run.recipe_path.write_text(json.dumps(second.run.recipe() | {"experts": {"tier": "disk", "resident": 3}}))
    third = on("disk", tmp_path / "parts").go(resume=second.saved[-1])
    # No bits are promised between products of all experts at once and of one after the other, on every machine.
    assert resident.weights.keys() == third.weights.keys()
    for name in differing(resident.weights, third.weights):
        torch.testing.assert_close(resident.weights[name], third.weights[name], rtol=1e-4, atol=1e-5, msg=name)
    assert_equal_runs(on("disk", tmp_path / "straight").go(), third)
    version = Registry(third.home).resolve(third.run.status.candidate)
    assert version.facts.kind == "adapter"
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder("tiny-qwen3-moe")), str(version.path)
    ).eval()
    with torch.no_grad():
        ours = load_base(version.ref, third.home, merge=False).model(input_ids=IDS).logits
        torch.testing.assert_close(ours, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_passes_and_gradients_are_those_above_resident_experts(tmp_path, tier):
    from nightschool.store.home import Home

    home = Home(tmp_path).ensure()
    found = []
    for place in (None, ExpertPlace(tier, tmp_path, 2, learns=False)):
        base = load_base(str(base_folder("tiny-mixtral")), home, merge=False, experts=place).model
        wrapped = attach_lora(base, LORA, seed=1)
        torch.manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        out = wrapped(IDS, labels=IDS)
        out.loss.backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
        found.append((out.logits.detach(), gradients, frozen_fingerprint(wrapped), describe_adapter(wrapped).reached))
    resident, streamed = found
    torch.testing.assert_close(streamed[0], resident[0], rtol=1e-4, atol=1e-5)
    assert streamed[1].keys() == resident[1].keys()
    for name, gradient in streamed[1].items():
        torch.testing.assert_close(gradient, resident[1][name], rtol=1e-3, atol=1e-6, msg=name)
    assert streamed[2:] == resident[2:]
    assert streamed[3]["experts.gate_up_proj"] == 2


def test_experts_that_were_named_for_nothing_stay_frozen_and_are_counted(tmp_path):
    from nightschool.store.home import Home

    place = ExpertPlace("disk", tmp_path, 2, learns=False)
    base = load_base(str(base_folder("tiny-qwen3-moe")), Home(tmp_path).ensure(), merge=False, experts=place).model
    facts = describe_adapter(attach_lora(base, Lora(r=2, target_modules=["attention"]), seed=0))
    assert facts.frozen_experts == 2 * 4 * 3 * 64 * 32


def test_the_plan_says_on_which_tier_frozen_experts_lie(tmp_path):
    facts = plan_of(on("disk", tmp_path / "run").prepared(), on("disk", tmp_path / "other").home).facts
    experts = 2 * 4 * 3 * 64 * 32
    assert facts["expert_bytes"]["disk"] >= 4 * experts
    assert facts["expert_bytes"]["device"] < 4 * experts
    assert facts["adapter_layers"]["experts.down_proj"] == 2


def test_what_cannot_be_is_refused_with_what_to_write(tmp_path):
    recipe = on("disk", tmp_path / "run").run.recipe()
    with pytest.raises(
        ValueError, match=r"`experts\.z_loss_coef` belongs to `method: full` or `method: pretrain`, and"
    ):
        Recipe.model_validate(recipe | {"experts": {"tier": "disk", "z_loss_coef": 0.1}})
    with pytest.raises(
        ValueError, match=r"`experts` belongs to `method: full`, `method: pretrain`, `method: lora` or `method: qlora`"
    ):
        Recipe.model_validate(recipe | {"method": "dpo"})


packs = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra `qlora` is not installed")


@packs
@pytest.mark.parametrize(("label", "tier"), [("nf4-double", "disk"), ("nf4", "host"), ("int8", "disk")])
def test_packed_experts_that_are_streamed_compute_what_packed_ones_compute_that_are_all_there(label, tier, tmp_path):
    from nightschool.store.home import Home

    home = Home(tmp_path).ensure()
    ref = f"{base_folder('tiny-mixtral')}[{label}]"
    found = []
    for place in (None, ExpertPlace(tier, tmp_path, 2, learns=False)):
        base = load_base(ref, home, merge=False, experts=place).model
        with torch.no_grad():
            alone = base(IDS).logits
        wrapped = attach_lora(base, LORA, seed=1)
        torch.manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        out = wrapped(IDS, labels=IDS)
        out.loss.backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
        found.append(
            (
                {"alone": alone, "logits": out.logits.detach()} | gradients,
                frozen_fingerprint(wrapped),
                expert_tiers(wrapped),
            )
        )
    (resident, fingerprint, _), (streamed, same, tiers) = found
    assert differing(resident, streamed) == []
    assert same == fingerprint, "so a run goes on on another tier"
    plain = 4 * count_parameters(wrapped).experts
    assert 0 < (tiers.disk or tiers.device) < plain * (0.35 if label == "int8" else 0.25)
    assert tiers.disk == 0 or tiers.device == tiers.disk / 4, "two of eight experts are in memory"


@packs
@pytest.mark.trains
def test_a_run_on_packed_experts_goes_on_on_another_tier(tmp_path):
    def qlora(tier, folder):
        return MiniRun(
            folder, "tiny-qwen3-moe", lora=LORA, recipe={"method": "qlora", "experts": {"tier": tier, "resident": 2}}
        )

    resident = qlora("device", tmp_path / "resident").go()
    first = qlora("disk", tmp_path / "parts").go(stop_after=3)
    first.run.recipe_path.write_text(json.dumps(first.run.recipe() | {"experts": {"tier": "device"}}))
    assert_equal_runs(resident, qlora("device", tmp_path / "parts").go(resume=first.saved[-1]))


def test_an_expert_that_is_not_finite_is_named_while_it_is_read(tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from nightschool.store.home import Home

    folder = tmp_path / "base"
    shutil.copytree(base_folder("tiny-qwen3-moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Damaged, match=r"expert 2 of layer model\.layers\.1\.mlp\.experts .* hold NaN or infinity"):
        load_base(str(folder), Home(tmp_path).ensure(), experts=ExpertPlace("host", tmp_path, 2, learns=False))


def test_the_gate_of_a_run_that_streams_its_experts_streams_them_too(tmp_path):
    done = on("disk", tmp_path / "run").go()
    registry = Registry(done.home)
    candidate = registry.resolve(done.run.status.candidate)
    with Comparison(done.home, done.run.id) as comparison:
        report = comparison.of(candidate.ref, None)
        pool = comparison._pool
    assert report.candidate == candidate.ref
    bound = pool.bind(located_version(candidate), lambda _: nullcontext())
    assert bound.engine.experts.store.host_bytes == 2 * bound.engine.experts.store.layout.stride
    assert bound.engine.base != candidate.ref, "and the adapter is not merged"
    pool.close(bound)
