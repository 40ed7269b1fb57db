"""Method qlora: it learns on a quantised base, resumes bit by bit, and is published, examined and served on that base."""

import json

import pytest
import torch

from nightschool.config.recipe import Lora, Recipe
from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.local_model import local_model
from nightschool.errors import ModelError, StateMismatch
from nightschool.events import read_events
from nightschool.jobs.starting_weights import starting_weights
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.models.quantize import is_quantized, quantization_of
from nightschool.store.registry import Registry
from nightschool.training.planning.plan import plan_of
from tests.support.documents import ARCHITECTURES
from tests.support.engine_setups import greedy, lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, lora_for
from tests.training.test_resume import assert_equal_runs

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
pytestmark = pytest.mark.trains

INT8 = {"bits": 8}


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def a_run(folder, architecture="tiny-qwen3", *, quantization=None, lora=LORA, **more):
    recipe = {"method": "qlora", "quantization": quantization or {}}
    return MiniRun(folder, architecture, lora=lora, recipe=recipe, **more)


@pytest.mark.parametrize(
    ("architecture", "quantization"), [*((one, None) for one in ARCHITECTURES), ("tiny-qwen3", INT8)]
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, architecture, quantization):
    settings = {"quantization": quantization, "lora": lora_for(architecture)}
    straight = a_run(tmp_path / "straight", architecture, **settings).go()
    first = a_run(tmp_path / "parts", architecture, **settings).go(stop_after=3)
    second = a_run(tmp_path / "parts", architecture, **settings).go(resume=first.saved[-1])
    assert_equal_runs(straight, second)


@pytest.mark.parametrize("quantization", [{}, INT8])
def test_it_learns_and_its_version_stands_on_the_quantised_base(tmp_path, quantization):
    rows = [{"query": "who?", "retrieved": "me, myself"}]
    settings = {
        "lora": Lora(r=8, alpha=32),
        "rows": rows,
        "held_out": [rows[0] | {"query": "hm?"}],
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    save_version_folder(lively_model("tiny-llama"), byte_tokenizer(), tmp_path / "base")
    settings |= {"base": str(tmp_path / "base"), "learning_rate": 1e-2, "steps_total": 80}
    run = a_run(tmp_path / "run", quantization=quantization, **settings).go()
    losses = [row["loss"] for row in read_events(run.run.metrics_path)]
    assert losses[-1] < losses[0] - 0.5
    version = Registry(run.home).resolve(run.run.status.candidate)
    label = "int8" if quantization else "nf4-double"
    assert version.facts.base.endswith(f"[{label}]")
    assert (version.facts.kind, version.facts.parent) == ("adapter", None)
    with local_model(run.home, version.ref) as model:
        assert quantization_of(model.engine.loaded.model) is not None, "the base is served quantised"
        assert model.engine.loaded.ref == version.facts.base, "and the adapter beside it"
        messages = [Message("user", "who?")]
        served = model.ask_greedily("q", messages, 12).result().token_ids
        prompt_ids = render_prompt(model.loaded.tokenizer, messages)
        assert list(served) == list(greedy(model.loaded.model, prompt_ids, len(served)))
        with model.loaded.model.disable_adapter():
            assert list(served) != list(greedy(model.loaded.model, prompt_ids, len(served)))


def test_the_next_night_goes_on_with_the_adapter_on_the_same_base(tmp_path):
    first = a_run(tmp_path / "first").go()
    registry = Registry(first.home)
    version = registry.resolve(first.run.status.candidate)
    registry.promote(version.name, version.id, by="test")
    recipe = Recipe.model_validate(first.run.recipe() | {"name": version.name})
    assert starting_weights(first.home, recipe) == version.ref
    second = a_run(tmp_path / "second", home=first.home, base=version.ref).go()
    facts = registry.resolve(second.run.status.candidate).facts
    assert (facts.base, facts.parent) == (version.facts.base, version.ref)
    # Others begin a new adapter on what the quantised base was made of.
    plain = version.facts.base.removesuffix("[nf4-double]")
    said = []
    other = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"bits": 8})})
    assert starting_weights(first.home, other, say=said.append) == plain
    assert "its base is nf4-double, and int8 is asked for" in said[0]
    lora = Recipe.model_validate(
        {k: v for k, v in first.run.recipe().items() if k != "quantization"} | {"method": "lora"}
    )
    assert starting_weights(first.home, lora.model_copy(update={"name": version.name})) == plain
    with pytest.raises(ModelError, match="asks for int8, but"):
        a_run(tmp_path / "third", home=first.home, base=version.ref, quantization=INT8).go()


def test_a_mixture_learns_on_experts_in_4_bits_and_is_served_merged(tmp_path):
    rows = [{"query": "who?", "retrieved": "me, myself"}]
    settings = {
        "lora": Lora(r=8, alpha=32, target_modules=["attention", "experts"]),
        "rows": rows,
        "held_out": [rows[0] | {"query": "hm?"}],
        "learning_rate": 1e-2,
        "steps_total": 40,
    }
    save_version_folder(lively_model("tiny-qwen3-moe"), byte_tokenizer(), tmp_path / "base")
    run = a_run(tmp_path / "run", base=str(tmp_path / "base"), **settings)
    kinds = plan_of(run.prepared(), prepared_home(tmp_path)).facts["parameter_bytes_by_kind"]
    experts = 2 * 4 * 3 * 64 * 32
    assert experts / 2 < kinds["experts"] < experts * 0.65, "half a byte for each weight, and scales"
    run.go()
    losses = [row["loss"] for row in read_events(run.run.metrics_path)]
    assert losses[-1] < losses[0] - 0.5
    version = Registry(run.home).resolve(run.run.status.candidate)
    assert version.facts.base.endswith("[nf4-double]")
    with local_model(run.home, version.ref) as model:
        messages = [Message("user", "who?")]
        served = model.ask_greedily("q", messages, 12).result().token_ids
        apart = load_base(version.ref, run.home, merge=False)
        prompt_ids = render_prompt(apart.tokenizer, messages)
        assert list(served) == list(greedy(apart.model, prompt_ids, len(served)))
        with apart.model.disable_adapter():
            assert list(served) != list(greedy(apart.model, prompt_ids, len(served)))
    with local_model(run.home, version.facts.base) as base:
        assert quantization_of(base.engine.loaded.model) is not None, "the base itself is served quantised"
        assert base.ask_greedily("q", messages, 4).result().token_ids


def test_another_quantisation_is_not_resumed(tmp_path):
    first = a_run(tmp_path / "run").go(stop_after=2)
    first.run.recipe_path.write_text(json.dumps(first.run.recipe() | {"quantization": {"double": False}}))
    with pytest.raises(StateMismatch, match=r"quantization\.double"):
        a_run(tmp_path / "run").go(resume=first.saved[-1])


def test_products_run_in_the_dtype_that_is_asked_for(tmp_path):
    for wanted, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        task = a_run(tmp_path / wanted, quantization={"compute_dtype": wanted}).prepared().task
        layers = [layer for layer in task.model.modules() if is_quantized(layer)]
        assert {layer.compute_dtype for layer in layers} == {expected}


def test_the_plan_counts_the_bytes_of_the_quantised_base(tmp_path):
    prepared = a_run(tmp_path / "run", optimizer="paged_adamw_8bit").prepared()
    plan = plan_of(prepared, prepared_home(tmp_path))
    lora = MiniRun(tmp_path / "lora", lora=LORA).prepared()
    other = plan_of(lora, prepared_home(tmp_path))
    assert plan.facts["quantization"] == "nf4-double"
    assert plan.facts["parameters_total"] == other.facts["parameters_total"]
    assert plan.facts["expected_peak_bytes"] < other.facts["expected_peak_bytes"]
    assert any("pages need a GPU" in note for note in plan.facts["notes"])
    assert not any("pages" in note for note in other.facts["notes"])


def prepared_home(folder):
    from nightschool.store.home import Home

    return Home(folder / "plans").ensure()


def test_all_weights_of_a_quantised_base_cannot_learn(tmp_path):
    run = MiniRun(tmp_path / "full")
    plain = run.run.recipe()
    run.run.recipe_path.write_text(json.dumps(plain | {"base": f"{plain['base']}[nf4]"}))
    with pytest.raises(ModelError, match="Take method: qlora"):
        MiniRun(tmp_path / "full").go()


# Optimizers of 8 bits.


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_of_8_bits_learns_and_resumes_bit_by_bit(tmp_path, optimizer):
    lora = Lora(r=64, alpha=64)  # factors of 4,096 elements and more have codes; smaller ones keep fp32
    straight = MiniRun(tmp_path / "straight", lora=lora, optimizer=optimizer).go()
    first = MiniRun(tmp_path / "parts", lora=lora, optimizer=optimizer).go(stop_after=3)
    second = MiniRun(tmp_path / "parts", lora=lora, optimizer=optimizer).go(resume=first.saved[-1])
    assert_equal_runs(straight, second)
    state = straight.prepared().task.optimizer
    assert state.moment_bytes == 2
    from nightschool.training.checkpoint.checkpoint_reader import load_group

    saved = load_group(straight.saved[-1], "optimizer")
    kinds = {tensor.dtype for name, tensor in saved.items() if name.startswith("first_moment.")}
    assert kinds == {torch.uint8, torch.float32}
    rows = [row["loss"] for row in read_events(straight.run.metrics_path)]
    assert rows[-1] < rows[0]


def test_other_optimizers_are_told_apart_but_pages_are_not(tmp_path):
    first = MiniRun(tmp_path / "run", lora=LORA, optimizer="paged_adamw_8bit").go(stop_after=2)
    plain = first.run.recipe()
    plain["train"]["optimizer"] = "adamw"
    first.run.recipe_path.write_text(json.dumps(plain))
    with pytest.raises(StateMismatch, match="optimizer algorithm"):
        MiniRun(tmp_path / "run", lora=LORA).go(resume=first.saved[-1])
    plain["train"]["optimizer"] = "adamw_8bit"
    first.run.recipe_path.write_text(json.dumps(plain))
    assert MiniRun(tmp_path / "run", lora=LORA).go(resume=first.saved[-1]).state.step == 10


def test_a_state_of_8_bits_cannot_be_shared_out():
    with pytest.raises(ValueError, match="cannot be shared out"):
        Recipe.model_validate(
            {"base": "x", "data": [{"path": "y"}], "train": {"zero_stage": 2, "optimizer": "adamw_8bit"}}
        )
