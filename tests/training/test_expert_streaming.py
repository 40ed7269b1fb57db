"""Experts that are streamed learn what resident ones learn, bit by bit, and a run may change from one to the other."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nightschool.config.recipe import Recipe, Train
from nightschool.data.batches import Batches
from nightschool.errors import Damaged, Interrupted, ModelError, NonFiniteLoss
from nightschool.layers import layer_by_layer
from nightschool.layers.expert_streaming.record import WEIGHTS
from nightschool.layers.expert_streaming.store import Visit
from nightschool.models import load, streamed
from nightschool.models.build import build_config, build_model
from nightschool.models.cost import count_parameters
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.models.streamed import ExpertPlace, build_streamed, expert_stream
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint.accelerate_layout import export_accelerate
from nightschool.training.distributed.world import ALONE
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.planning.plan import make_plan
from nightschool.training.run import execute
from nightschool.work.host_memory import HostBytes
from nightschool.work.stop import Stop
from tests.support.shard_setups import write_shards
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import NUM_THREADS, VOCAB_SIZE, deterministic_threads, random_documents

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 6, "expert_size": 24}
DOCUMENTS = random_documents(8, seed=3)
TIERS = ("host", "disk")


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def task_of(tier, folder, **train):
    if tier == "device":
        model = build_model("new:moe-tiny", VOCAB_SIZE, 1, shape=SHAPE)
    else:
        config = build_config("new:moe-tiny", VOCAB_SIZE, shape=SHAPE)
        model = build_streamed(config, 1, ExpertPlace(tier, folder, 2), "cpu")
    settings = Train(**({"learning_rate": 1e-2, "weight_decay": 0.1} | train))
    return FinetuneTask(model, Batches(DOCUMENTS, batch_size=1, seed=0), settings)


def step(task, number, *, scaler=None, micro_batches=2, clip=0.3):
    """A step of single short documents, so that some experts get nothing; returns the loss and the norm."""
    window = [task.batch(0, (number * micro_batches + each) % 8) for each in range(micro_batches)]
    loss = task.accumulate(window, sum(batch.loss_units for batch in window), scaler)
    return loss.item(), task.update(1e-2 / (1 + number), clip, scaler, ALONE).item()


def state_of(task):
    return {source.name: source.tensor() for source in [*task.weights(), *task.optimizer_state()]}


def assert_equal_states(one, other):
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert one.optimizer_facts() == other.optimizer_facts()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"expert_learning_rate": 3e-3, "gradient_checkpointing": True, "accumulation_steps": 1}],
    ids=["plain", "own rate, recomputed, micro-batches one after the other"],
)
def test_every_weight_and_moment_is_that_of_resident_experts(tmp_path, tier, settings):
    resident, streamed = task_of("device", tmp_path, **settings), task_of(tier, tmp_path, **settings)
    assert_equal_states(resident, streamed)  # the same random numbers, before the first step
    for number in range(6):
        assert step(resident, number) == step(streamed, number)
        if number == 2:  # what is measured or evaluated in between leaves no trace
            for task in (resident, streamed):
                task.accumulate([task.batch(0, 5)], 7)
                task.discard_gradients()
    assert_equal_states(resident, streamed)
    assert count_parameters(resident.model) == count_parameters(streamed.model)


@pytest.mark.parametrize(
    ("base", "shape", "settings"),
    [
        ("new:moe-tiny", SHAPE | {"shared_expert_size": 40, "num_active_experts": 4}, {"gradient_checkpointing": True}),
        ("tiny-mixtral", None, {}),
    ],
)
def test_each_expert_is_loaded_once_in_a_direction_for_all_micro_batches(tmp_path, monkeypatch, base, shape, settings):
    train = Train(learning_rate=1e-2, accumulation_steps=4, **settings)
    place, batches = ExpertPlace("disk", tmp_path, 2), Batches(DOCUMENTS, batch_size=1, seed=0)
    resident, streamed = (
        FinetuneTask(model.train(), batches, train, compute_dtype=torch.bfloat16)
        for model in (
            build_model(base, VOCAB_SIZE, 1, shape=shape),
            build_streamed(build_config(base, VOCAB_SIZE, shape=shape), 1, place, "cpu"),
        )
    )
    store, visited = expert_stream(streamed.model).store, Counter()
    walk = store.walk

    def counted(visits):
        for index, record in walk(visits):
            visited[index] += 1
            yield index, record

    for number in range(3):
        monkeypatch.setattr(layer_by_layer, "MOST_NESTED", 128 if number < 2 else 3)  # as if there were more of them
        monkeypatch.setattr(store, "walk", counted)
        visited.clear()
        seen = [step(task, number, micro_batches=4) for task in (resident, streamed)]
        assert max(visited.values()) == (2 if number < 2 else 3)
        assert seen[0] == seen[1]
        assert resident.figures() == streamed.figures()
    monkeypatch.undo()
    assert_equal_states(resident, streamed)


def test_experts_without_a_token_decay_too(tmp_path):
    task = task_of("disk", tmp_path)
    stream = expert_stream(task.model)
    before = state_of(task)
    window = [task.batch(0, 0)]
    task.accumulate(window, window[0].loss_units)
    idle = (stream.norms_l2n.sum(dim=1) == 0).nonzero().tolist()
    task.update(1e-2, 0.0, None, ALONE)
    assert idle, "a short document reaches all experts"
    after = state_of(task)
    for layer, expert in idle:
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        assert torch.allclose(after[name][expert], before[name][expert] * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize("tier", TIERS)
def test_a_step_that_overflows_in_fp16_is_skipped_for_experts_too(tmp_path, tier):
    tasks = [task_of(each, tmp_path) for each in ("device", tier)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2) for _ in tasks]
    seen = [
        [step(task, number, scaler=scaler) for number in range(5)] for task, scaler in zip(tasks, scalers, strict=True)
    ]
    assert str(seen[0]) == str(seen[1])  # of which some are infinite
    assert not all(norm < float("inf") for _, norm in seen[0])
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert_equal_states(*tasks)


def test_an_expert_that_is_not_a_number_is_named_and_the_step_refused(tmp_path):
    task = task_of("disk", tmp_path)
    step(task, 0)
    task.weights()
    stream = expert_stream(task.model)
    for _, record in stream.store.walk([Visit(stream.index(1, 4), (WEIGHTS,), (WEIGHTS,))]):
        record[WEIGHTS][5] = float("nan")
    everything = [task.batch(0, place) for place in range(8)]  # so that a token comes to it
    before = {name: tensor.clone() for name, tensor in task.saved_tensors().items()}
    task.accumulate(everything, 8)
    with pytest.raises(NonFiniteLoss, match=r"expert 4 of layer model.layers.1.mlp.experts hold NaN"):
        task.update(1e-2, 0.3, None, ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.saved_tensors().items())


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("architecture", ["tiny-qwen3-moe", "tiny-mixtral", "stacked"])
def test_a_stock_folder_is_read_expert_by_expert(tmp_path, architecture, learns):
    tokenizer, folder = byte_tokenizer(), tmp_path / "stock"
    stacked = architecture == "stacked"
    model = build_model("tiny-qwen3-moe" if stacked else architecture, len(tokenizer), seed=3, eos_token_id=0)
    save_version_folder(model, tokenizer, folder)
    plain = model.state_dict()
    if stacked:
        save_file({name: tensor.clone() for name, tensor in plain.items()}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    place = ExpertPlace("disk", tmp_path, 2, learns=learns)
    loaded = load_base(str(folder), Home(tmp_path), experts=place).model
    stream = expert_stream(loaded)
    for name, (layer, which) in stream.shape.stacked().items():
        assert all(torch.equal(a, b) for a, b in zip(stream.rows(WEIGHTS, layer, which), plain[name], strict=True))
    ids = torch.arange(24)[None]
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    # What does not learn is read where it lies.
    assert stream.store.disk_bytes >= sum(plain[name].nbytes for name in stream.shape.stacked())
    assert (stream.store.taken_disk_bytes == 0) is not learns


def test_a_stock_folder_with_other_experts_is_refused(tmp_path):
    tokenizer, folder = byte_tokenizer(), tmp_path / "stock"
    save_version_folder(build_model("tiny-qwen3-moe", len(tokenizer), seed=3, eos_token_id=0), tokenizer, folder)
    place, whole = ExpertPlace("disk", tmp_path, 2), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(
        Damaged, match=r"The tensor model\.layers\.0\.mlp\.experts\.4\.gate_proj\.weight .* is not in its files"
    ):
        load_base(str(folder), Home(tmp_path), experts=place)
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 40}))
    with pytest.raises(Damaged, match=r"has the shape \[32, 64\], and its configuration says \[40, 64\]"):
        load_base(str(folder), Home(tmp_path), experts=place)
    (folder / "config.json").write_text(json.dumps(config))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file(
        {key: tensor for key, tensor in whole.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(Damaged, match=rf"{name} .* is not in its files"):
        load_base(str(folder), Home(tmp_path), experts=place)
    more = {name.replace(".2.", ".4."): whole[name].clone()}
    save_file(whole | more, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        Damaged, match=r"experts\.4\.up_proj\.weight, and by its configuration there are 4 experts in 2 layers"
    ):
        load_base(str(folder), Home(tmp_path), experts=place)
    whole[name][3, 3] = float("inf")
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        Damaged, match=r"weights of expert 2 of layer model\.layers\.1\.mlp\.experts .* hold NaN or infinity"
    ):
        load_base(str(folder), Home(tmp_path), experts=place)


def test_a_new_model_without_room_is_refused_before_it_is_built(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(load, "host_bytes", lambda: HostBytes(10**12, 2 * 10**11))
    monkeypatch.setattr(load, "build_model", None)
    with pytest.raises(
        ModelError,
        match=r"'new:moe-13b' has 13,\d{3},\d{3},\d{3} parameters: 52\.\d GB in fp32, and 209 GB with .* 200 GB of memory are free",
    ):
        load_base("new:moe-13b", Home(tmp_path), tokenizer=tokenizer, moment_bytes=8)
    with pytest.raises(TypeError, match="not callable"):  # there is room for moments of 8 bits each
        load_base("new:moe-13b", Home(tmp_path), tokenizer=tokenizer, moment_bytes=2)


def test_a_model_without_experts_and_other_optimizers_are_refused(tmp_path):
    place = ExpertPlace("disk", tmp_path, 2)
    with pytest.raises(ModelError, match=r"a qwen3 model has no experts that can be streamed"):
        load_base("new:tiny", Home(tmp_path), tokenizer=byte_tokenizer(), experts=place)
    for settings, said in (
        ({"optimizer": "adamw_8bit"}, "learn by adamw alone"),
        ({"num_processes": 2}, "in one process"),
    ):
        with pytest.raises(ModelError, match=said):
            task_of("disk", tmp_path, **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder)
    return folder


def recipe_of(corpus, tier, resident=3):
    return {
        "name": "moe",
        "base": "new:moe-tiny",
        "method": "pretrain",
        "shape": SHAPE,
        "experts": {"tier": tier, "resident": resident},
        "data": [{"path": str(corpus / "shards")}],
        "held_out": {"share": 0.2},
        "pretrain": {"sample_tokens": 0},
        "train": {
            "max_steps": 5,
            "max_seq_len": 32,
            "batch_size": 2,
            "accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.5,
            "dtype": "fp32",
            "num_threads": NUM_THREADS,
        },
        "serve": {"promote": "always"},
    }


def trained(corpus, folder, *tiers):
    """Train on one tier, or begin on one and go on, on another; return the last checkpoint's digests, and the version's folder."""
    home = Home(folder)
    home.ensure()
    run = RunStore(home).create(recipe_of(corpus, tiers[0]), name="moe")
    if len(tiers) > 1:
        with pytest.raises(Interrupted):
            execute(home, run, resume=None, root=corpus, stop=Stop(), steps=3)
        run.recipe_path.write_text(json.dumps(run.recipe() | {"experts": {"tier": tiers[1], "resident": 2}}))
        run = RunStore(home).get(run.id)
    execute(home, run, resume="latest" if len(tiers) > 1 else None, root=corpus, stop=Stop())
    return digests_of(run), Registry(home).resolve(run.status.candidate).path


def digests_of(run):
    last = max(checkpoints.ls(run), key=lambda point: point.step).path
    names = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors")
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def resident_run(tmp_path_factory, corpus):
    with deterministic_threads():
        return trained(corpus, tmp_path_factory.mktemp("resident"), "device")


# Each kill in a process of its own, all of them from one that has imported everything.
KILLED = """
import os, sys
from benchmarks import kill_points
from nightschool.training import run

for number, (place, left, fails_at) in enumerate([("write-back", 150, 0), ("save", 9, 0), ("emergency save", 40, 2)]):
    child = os.fork()
    if not child:
        kill_points.arm(place, left, fails_at=fails_at)
        os._exit(run.main([*sys.argv[1:], *(["--resume", "latest"] if number else [])]))
    print("KILLED" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9 else "NOT KILLED", place)
"""


@pytest.mark.trains
def test_a_run_that_is_killed_while_it_writes_experts_or_saves_them_goes_on_exactly(tmp_path, corpus, resident_run):
    home = Home(tmp_path)
    home.ensure()
    recipe = recipe_of(corpus, "disk") | {"checkpoints": {"every": "3 steps"}}
    run = RunStore(home).create(recipe, name="moe")
    arguments = ["--home", str(tmp_path), "--run", run.id, "--root", str(corpus)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    said = done.stdout.split("\n")
    assert [line for line in said if "KILLED" in line] == [
        f"KILLED {place}" for place in ("write-back", "save", "emergency save")
    ]
    assert [path.name for path in run.path.iterdir() if path.stat().st_size > 10**5] == []  # no file of experts is left
    execute(home, RunStore(home).get(run.id), resume="latest", root=corpus, stop=Stop())
    assert digests_of(run) == resident_run[0]
    last = max(checkpoints.ls(run), key=lambda point: point.step)
    export_accelerate(home, run, last, tmp_path / "accelerate", root=corpus)
    exported = {name for file in (tmp_path / "accelerate").rglob("*.safetensors") for name in load_file(file)}
    assert exported >= {f"model.layers.1.mlp.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")}


@pytest.mark.trains
def test_a_run_goes_on_on_any_other_tier_and_becomes_the_same_folder(tmp_path, corpus, resident_run):
    wanted, folder = resident_run
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for tiers in (("disk", "host"), ("device", "disk"), ("host", "device")):
        digests, folder = trained(corpus, tmp_path / "-".join(tiers), *tiers)
        assert digests == wanted, tiers
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in plain.items()), tiers


def test_the_plan_says_on_which_tier_the_bytes_lie(tmp_path, corpus):
    plans = {
        tier: make_plan(Recipe.model_validate(recipe_of(corpus, tier)), Home(tmp_path), corpus).facts
        for tier in ("device", "host", "disk")
    }
    experts = 16 * 2 * 6 * 3 * 32 * 24
    assert plans["device"]["expert_bytes"] == plans["host"]["expert_bytes"] == {"device": experts, "host": 0, "disk": 0}
    assert plans["disk"]["expert_bytes"]["disk"] > experts  # by gaps up to the next page
    assert plans["disk"]["expert_bytes"]["device"] * 4 == plans["disk"]["expert_bytes"]["disk"]
    assert len({plan["parameters_total"] for plan in plans.values()}) == 1
    assert plans["disk"]["expected_peak_bytes"] < plans["device"]["expected_peak_bytes"]
    assert plans["disk"]["expert_step_bytes"] == 9 * experts // 4  # whatever the number of micro-batches
    assert plans["device"]["expert_step_bytes"] == plans["host"]["expert_step_bytes"] == 0
    assert plans["disk"]["expected_step_seconds"] > plans["disk"]["expected_moving_seconds"] > 0
    assert plans["device"]["expected_moving_seconds"] == plans["host"]["expected_moving_seconds"] == 0


def test_a_budget_that_cannot_hold_is_refused_with_one_that_would(tmp_path, monkeypatch):
    one = 16 * 3 * 32 * 24
    monkeypatch.setattr(streamed, "host_bytes", lambda: HostBytes(10**9, 5 * one))
    config = build_config("new:moe-tiny", VOCAB_SIZE, shape=SHAPE)
    with pytest.raises(ModelError, match=r"12 experts .* Write experts\.tier: disk"):
        build_streamed(config, 1, ExpertPlace("host", tmp_path, 2), "cpu")
    with pytest.raises(ModelError, match=r"6 experts .* Write experts\.resident: 5, where 2 is the least"):
        build_streamed(config, 1, ExpertPlace("disk", tmp_path, 6), "cpu")
    with pytest.raises(ValidationError, match=r"experts\.resident\s+Input should be greater than or equal to 2"):
        Recipe.model_validate(recipe_of(tmp_path, "disk", resident=1))
