"""A mixture of experts by the ordinary methods: planned, trained, published as a stock folder, and served."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nightschool.config.load import load_recipe
from nightschool.config.recipe import Recipe
from nightschool.errors import ModelError, RecipeError, UsageError
from nightschool.events import read_events
from nightschool.models.load import load_base
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint.accelerate_layout import export_accelerate
from nightschool.training.methods.prepared import Setup
from nightschool.training.methods.pretrain import Pretrain
from nightschool.training.planning.plan import make_plan
from nightschool.training.run import execute
from nightschool.work.stop import Stop
from tests.support.shard_setups import write_shards
from tests.support.training_setups import NUM_THREADS, deterministic_threads

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 4, "expert_size": 24}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder)
    return folder


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def recipe_of(corpus, **changes):
    return {
        "name": "moe",
        "base": "new:moe-tiny",
        "method": "pretrain",
        "shape": SMALL,
        "data": [{"path": str(corpus / "shards")}],
        "held_out": {"share": 0.2},
        "pretrain": {"sample_tokens": 0},
        "train": {
            "max_steps": 12,
            "max_seq_len": 32,
            "batch_size": 2,
            "accumulation_steps": 2,
            "learning_rate": 1e-2,
            "dtype": "fp32",
            "num_threads": NUM_THREADS,
        },
        "serve": {"promote": "always"},
    } | changes


@pytest.mark.trains
def test_it_learns_from_shards_and_becomes_a_folder_that_transformers_loads(tmp_path, corpus):
    home = Home(tmp_path / "home")
    home.ensure()
    recipe = recipe_of(corpus)
    recipe["train"] |= {"expert_learning_rate": 8e-3}
    run = RunStore(home).create(recipe, name="moe")
    execute(home, run, resume=None, root=corpus, stop=Stop())
    rows = list(read_events(run.metrics_path))
    assert rows[-1]["heldout_loss"] < rows[0]["loss"] - 0.5
    for row in rows:
        assert 0.99 < row["load_balancing_loss"] < 4
        assert 0 < row["expert_router_entropy"] <= torch.tensor(4.0).log().item() + 1e-6
        assert 0 <= row["dead_experts"] <= 8
    version = Registry(home).resolve(run.status.candidate)
    plain = AutoModelForCausalLM.from_pretrained(version.path, dtype=torch.float32).eval()
    assert plain.config.architectures == ["Qwen3MoeForCausalLM"]
    assert (plain.config.num_experts, plain.config.num_experts_per_tok) == (4, 2)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, load_base(version.ref, home).model(ids).logits)
    with pytest.raises(UsageError, match=r"expert_learning_rate gives the experts of this run a schedule of their own"):
        export_accelerate(home, run, checkpoints.ls(run)[-1], tmp_path / "out", root=corpus)
    assert not (tmp_path / "out").exists()


def test_its_plan_says_what_is_active_and_on_which_tier_bytes_lie(tmp_path, corpus):
    plan = make_plan(Recipe.model_validate(recipe_of(corpus)), Home(tmp_path))
    experts = 2 * 4 * 3 * 32 * 24
    assert plan.facts["num_experts"] == 4
    assert plan.facts["num_active_experts"] == 2
    assert plan.facts["parameters_active"] == plan.facts["parameters_total"] - experts // 2
    assert plan.facts["expert_bytes"] == {"device": 16 * experts, "host": 0, "disk": 0}
    (row,) = (row for row in plan.rows if row.label == "experts")
    assert row.text.startswith("4 in a layer, 2 for a token, so ")
    assert row.text.endswith("kB on the device, 0 B on the host, 0 B on the disk")


def test_a_dense_run_has_no_row_of_experts(tmp_path, corpus):
    dense = recipe_of(corpus, base="new:tiny", shape={"hidden_size": 32, "num_hidden_layers": 1})
    assert "num_experts" not in make_plan(Recipe.model_validate(dense), Home(tmp_path)).facts


def test_settings_of_experts_are_refused_where_none_learn(tmp_path, corpus):
    dense = recipe_of(corpus, base="new:tiny", shape={}, experts={"z_loss_coef": 0.1})
    with pytest.raises(ModelError, match="none learns here"):
        Pretrain.prepare(Setup(Recipe.model_validate(dense), Home(tmp_path), corpus))
    with pytest.raises(ValueError, match=r"`experts\.z_loss_coef` belongs to `method: full` or `method: pretrain`"):
        Recipe.model_validate(recipe_of(corpus, method="lora", shape={}, base="x/y", experts={"z_loss_coef": 0.1}))


@pytest.mark.parametrize(("name", "base"), [("moe-tiny", "new:moe-tiny"), ("moe-350m-shards", "new:moe-350m")])
def test_the_recipes_that_come_along_are_mixtures(name, base):
    path = Path(f"recipes/{name}.yaml")
    recipe = load_recipe(path, env={}).recipe
    assert (recipe.base, recipe.shape.num_experts, recipe.shape.num_active_experts) == (base, 8, 2)
    larger = load_recipe(path, ["model.preset=7B", "model.num_experts=128"], env={}).recipe
    assert (larger.base, larger.shape.num_experts) == ("new:moe-7b", 128)
    with pytest.raises(RecipeError, match="'2B' is not a preset of mixtures"):
        load_recipe(path, ["model.preset=2B"], env={})


def test_the_recipe_of_a_mixture_takes_data_sets_experts_and_epochs_from_the_command_line():
    settings = ["dataset=chat,code", "model.num_experts=8", "epochs=1"]
    recipe = load_recipe(Path("recipes/moe-350m.yaml"), settings, env={}).recipe
    assert (recipe.method, recipe.base, recipe.shape.num_experts) == ("full", "new:moe-350m", 8)
    assert [source.dataset for source in recipe.data] == [["chat", "code"]]
    assert (recipe.train.epochs, recipe.train.max_steps) == (1, None)
    # A preset brings its own number of experts where none is named.
    assert load_recipe(Path("recipes/moe-350m.yaml"), ["model.preset=7B"], env={}).recipe.shape.num_experts is None
