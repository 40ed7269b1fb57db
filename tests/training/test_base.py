"""What a base must be: servable, before it is trained; and below an adapter it keeps the number format of its files."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nightschool.config.recipe import Recipe, Serve
from nightschool.data.tokenizer import train_bpe
from nightschool.engine.model_runner import ModelRunner
from nightschool.errors import ModelError
from nightschool.events import read_events
from nightschool.layers.forward import prepare
from nightschool.models import dtype as dtype_module
from nightschool.models.build import PRESETS, build_model
from nightschool.models.export import save_version_folder
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import Setup
from nightschool.training.planning.plan import make_plan, plan_of
from nightschool.training.run import main
from tests.support.training_setups import NUM_THREADS, deterministic_threads, differing

ROWS = [{"prompt": f"Where is number {i}?", "completion": f"In room {i + 7}."} for i in range(6)]
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture
def home(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Home(tmp_path / "home").ensure()


SMALL = PRESETS["tiny-llama"]
# The smallest preset of each architecture: what can be served depends on the layers, not on their size.
BY_SIZE = sorted(PRESETS, key=lambda name: PRESETS[name]["hidden_size"], reverse=True)
ARCHITECTURES = sorted({PRESETS[name]["model_type"]: name for name in BY_SIZE}.values())
OTHERS = [
    SMALL | {"model_type": "gemma2", "query_pre_attn_scalar": 16},
    SMALL | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False},
    {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4},
]


def make_base(root, dtype, architecture="tiny-qwen3"):
    tokenizer = train_bpe([text for row in ROWS for text in row.values()] * 3, 300)
    model = build_model(architecture, len(tokenizer), 1).to(dtype)
    save_version_folder(model, tokenizer, root / "base")
    return root / "base"


def recipe_of(*, dtype, base="./base", **train):
    settings = {"num_threads": NUM_THREADS, "dtype": dtype, "batch_size": 2, "epochs": 4, "learning_rate": 1e-2}
    return Recipe.model_validate(
        {
            "name": "bot",
            "base": base,
            "method": "lora",
            "lora": LORA,
            "data": [{"path": "rows.jsonl"}],
            "study": {"write": "off"},
            "train": settings | {"accumulation_steps": 1} | train,
            "checkpoints": {"every": "4 steps", "keep": {"last": 9}},
        }
    )


def prepared_for(recipe, home, root):
    return METHODS[recipe.method].prepare(Setup(recipe, home, root))


def dtypes_of(model):
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    return frozen, trained


@pytest.mark.parametrize(
    ("stored", "compute", "frozen"),
    [
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.float16, "bf16", torch.float16),
        (torch.float16, "fp16", torch.float16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.float32),
    ],
)
def test_the_base_keeps_its_format_where_products_run_in_16_bits(home, tmp_path, stored, compute, frozen):
    make_base(tmp_path, stored)
    model = prepared_for(recipe_of(dtype=compute), home, tmp_path).task.model
    assert dtypes_of(model) == ({frozen}, {torch.float32})


@pytest.mark.parametrize(("speedup", "frozen"), [(9.0, torch.bfloat16), (0.1, torch.float32)])
def test_on_a_cpu_a_measurement_decides(home, tmp_path, monkeypatch, speedup, frozen):
    make_base(tmp_path, torch.bfloat16)
    monkeypatch.setattr(dtype_module, "bf16_speedup", lambda width: speedup)
    prepared = prepared_for(recipe_of(dtype="auto"), home, tmp_path)
    assert dtypes_of(prepared.task.model) == ({frozen}, {torch.float32})
    assert prepared.task.compute_dtype == prepared.dtype.compute == frozen
    assert ("the frozen base stays in bf16" in prepared.dtype.why) == (frozen == torch.bfloat16)


def test_the_plan_counts_half_the_bytes(home, tmp_path):
    make_base(tmp_path, torch.bfloat16)
    narrow, wide = (
        SimpleNamespace(**make_plan(recipe_of(dtype=dtype), home, tmp_path).facts) for dtype in ("bf16", "fp32")
    )
    frozen = narrow.parameters_total - narrow.parameters_trainable
    assert wide.expected_peak_bytes - narrow.expected_peak_bytes >= 2 * frozen


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["model_type"])
@pytest.mark.filterwarnings("ignore")
def test_a_base_that_could_not_be_served_is_refused_before_step_1(home, tmp_path, config):
    make_base(tmp_path, torch.float32, config)
    recipe = recipe_of(dtype="fp32", base="./base").model_copy(update={"method": "full"})
    with pytest.raises(ModelError, match="can be trained, but neither examined nor served"):
        prepared_for(recipe, home, tmp_path)
    elsewhere = recipe.model_copy(update={"serve": Serve(promote="never")})
    prepared = prepared_for(elsewhere, home, tmp_path)
    assert not prepared.task.path.packed
    assert any("the gate of its candidate will fail" in note for note in plan_of(prepared, home).facts["notes"])


@pytest.mark.parametrize("config", [*ARCHITECTURES, *OTHERS], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_before_training_is_what_the_engine_refuses(config):
    model = build_model(config, 300, 1).eval()
    if prepare(model).packed:
        ModelRunner(model)
    else:
        with pytest.raises(ModelError, match="The engine cannot serve"):
            ModelRunner(model)


def losses_of(run):
    return [row["loss"] for row in read_events(run.metrics_path)]


@pytest.mark.trains
@pytest.mark.parametrize("architecture", ["tiny-qwen3", "tiny-qwen3-moe", "tiny-mixtral", "tiny-gpt-neox"])
def test_an_adapter_on_16_bits_learns_resumes_exactly_and_goes_on_the_next_night(home, tmp_path, architecture):
    make_base(tmp_path, torch.bfloat16, architecture)

    def train(run, *more):
        return main(["--home", str(home.path), "--run", run.id, "--root", str(tmp_path), *more])

    run = RunStore(home).create(recipe_of(dtype="bf16").as_plain(), name="bot")
    assert train(run) == 0, run.status.error
    losses, version = losses_of(run), Registry(home).resolve(run.status.candidate)
    assert losses[-1] < losses[0] - 0.3
    adapter = load_file(version.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}

    run.update_status(candidate=None)
    assert train(run, "--resume", checkpoints.ls(run)[0].name) == 0, run.status.error
    again = Registry(home).resolve(run.status.candidate)
    assert again.id != version.id
    assert losses_of(run) == losses
    assert not differing(adapter, load_file(again.path / "adapter_model.safetensors"))

    recipe = recipe_of(dtype="bf16", base=again.ref, epochs=1)
    assert dtypes_of(prepared_for(recipe, home, tmp_path).task.model) == ({torch.bfloat16}, {torch.float32})
    following = RunStore(home).create(recipe.as_plain(), name="bot")
    assert train(following) == 0, following.status.error
    assert losses_of(following)[0] < losses[0] - 0.3
