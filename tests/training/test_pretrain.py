"""Pretraining end to end: it learns, it resumes exactly, its figures are right, and what is wrong is said before step 1."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nightschool.config.recipe import Recipe
from nightschool.data.shards.shards import INDEX, read_index
from nightschool.errors import DataError, Interrupted, ModelError, NonFiniteLoss, UsageError
from nightschool.events import read_events
from nightschool.models.cost import count_parameters
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.training import run as run_module
from nightschool.training.distributed.world import World
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.prepared import Setup
from nightschool.training.methods.pretrain import Pretrain, open_source
from nightschool.training.planning.plan import make_plan
from nightschool.training.run import execute
from nightschool.work.stop import Stop
from tests.support.shard_setups import tokenizer, write_shards
from tests.support.training_setups import NUM_THREADS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


def recipe_of(corpus, **changes):
    train = {
        "max_steps": 12,
        "max_seq_len": 32,
        "batch_size": 2,
        "accumulation_steps": 2,
        "learning_rate": 1e-2,
        "dtype": "fp32",
        "num_threads": NUM_THREADS,
        "evaluate_every": "4 steps",
    } | changes.pop("train", {})
    return {
        "name": "neox",
        "base": "new:neox-tiny",
        "method": "pretrain",
        "shape": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "data": [{"path": str(corpus / "shards")}],
        "held_out": {"share": 0.2},
        "pretrain": {"sample_tokens": 4},
        "train": train,
        "checkpoints": {"every": "3 steps", "keep": {"last": 9}},
        "serve": {"promote": "always"},
    } | changes


class StopAtStep(Stop):
    """Asks to stop at the first look after so many looks."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


def pretrain(home, corpus, *, stop=None, run=None, **changes):
    home.ensure()
    new = run is None
    run = run or RunStore(home).create(recipe_of(corpus, **changes), name="neox")
    execute(home, run, resume=None if new else "latest", root=corpus, stop=Stop() if stop is None else stop)
    return run


@pytest.mark.trains
def test_a_run_learns_and_publishes_what_it_learned(tmp_path, corpus, capsys):
    home = Home(tmp_path / "home")
    run = pretrain(home, corpus)
    rows = list(read_events(run.metrics_path))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["heldout_loss"] < rows[0]["loss"] - 0.5
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert 0 < row["mfu"] < 1
    index = json.loads((corpus / "shards" / INDEX).read_text())
    assert rows[3]["bits_per_byte"] == pytest.approx(rows[3]["loss"] / math.log(2) / index["bytes_per_token"])
    assert "heldout_bits_per_byte" in rows[3]
    assert rows[-1]["eta_seconds"] == 0
    samples = [event for event in read_events(run.events_path) if event["event"] == "sample"]
    assert samples[0]["step"] == 0
    assert samples[-1]["continuation"]
    version = Registry(home).resolve(run.status.candidate)
    assert version.facts.method == "pretrain"
    assert "MFU" in capsys.readouterr().out
    assert (run.path / "tensorboard").is_dir()


def test_a_run_keeps_the_memory_of_its_steps_once_all_is_loaded(tmp_path, corpus, monkeypatch):
    order = []
    for name in ("prepare", "keep_freed_memory", "fit"):
        called = getattr(run_module, name)
        monkeypatch.setattr(
            run_module, name, lambda *a, name=name, called=called, **k: (order.append(name), called(*a, **k))[1]
        )
    pretrain(Home(tmp_path / "home").ensure(), corpus)
    assert order == ["prepare", "keep_freed_memory", "fit"]


@pytest.mark.trains
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, corpus):
    straight, broken = Home(tmp_path / "a"), Home(tmp_path / "b")
    first = pretrain(straight, corpus)
    with pytest.raises(Interrupted):
        pretrain(broken, corpus, stop=StopAtStep(7))
    second = RunStore(broken).ls()[0]
    assert checkpoints.newest_whole(second).checkpoint.step == 7
    pretrain(broken, corpus, run=second)
    keys = ("step", "loss", "heldout_loss", "grad_norm", "learning_rate", "tokens_trained_total")
    rows = [[{key: row.get(key) for key in keys} for row in read_events(run.metrics_path)] for run in (first, second)]
    assert rows[0] == rows[1]
    one, two = (checkpoints.newest_whole(run).checkpoint.path for run in (first, second))
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_adding_padding_changes_no_loss(tmp_path, corpus):
    """Rows padded to twice their length hold the same tokens, and train the same."""
    padded = tmp_path / "padded"
    padded.mkdir()
    for path in sorted((corpus / "shards").glob("*.npz")):
        with np.load(path) as shard:
            rows = [row[:n] for row, n in zip(shard["input_ids"], shard["sequence_lengths"], strict=True)]
        flat = np.concatenate(rows).astype(np.int32)
        ids = np.zeros((1, 2 * len(flat)), dtype=np.int32)
        ids[0, : len(flat)] = flat
        mask = (np.arange(2 * len(flat)) < len(flat))[None].astype(np.int32)
        np.savez(padded / path.name, input_ids=ids, attention_mask=mask)
    mine = tokenizer()
    mine.save_pretrained(tmp_path / "tokenizer")
    losses = []
    for place, more in ((corpus / "shards", {}), (padded, {"tokenizer": str(tmp_path / "tokenizer")})):
        plain = recipe_of(corpus, data=[{"path": str(place)}], **more)
        room = Pretrain.prepare(Setup(Recipe.model_validate(plain), Home(tmp_path / "home"), Path.cwd()))
        batch = room.task.batch(0, 0)
        losses.append((room.task.loss(batch).sum.item(), batch.tokens_trained))
    assert losses[0] == losses[1]


def test_documents_end_in_shards_that_a_pattern_names(tmp_path, corpus):
    index = read_index(corpus / "shards" / INDEX)
    recipe = Recipe.model_validate(recipe_of(corpus, data=[{"path": str(corpus / "shards" / "tokens_*.npz")}]))
    source, _ = open_source(recipe, Home(tmp_path), corpus)
    assert source.shards.index.eos_token_id == index.eos_token_id
    assert source.shards.index.shards == index.shards


def test_the_plan_counts_what_is_there(tmp_path, corpus):
    home = Home(tmp_path / "home")
    recipe = Recipe.model_validate(recipe_of(corpus))
    plan, room = SimpleNamespace(**make_plan(recipe, home).facts), Pretrain.prepare(Setup(recipe, home, Path.cwd()))
    assert plan.parameters_total == sum(p.numel() for p in room.task.model.parameters())
    assert plan.parameters_total == count_parameters(room.task.model).total
    assert plan.sequences + plan.sequences_held_out == (plan.tokens - plan.tokens_left_over) // 32
    assert plan.steps_per_epoch == steps_in_epoch(plan.sequences, 2, 2)
    assert plan.tokens_per_step == 2 * 2 * 32


def test_the_plan_of_several_processes_counts_their_steps(tmp_path, corpus):
    plain = recipe_of(corpus, train={"num_processes": 2, "max_steps": None, "epochs": 3})
    plan = SimpleNamespace(**make_plan(Recipe.model_validate(plain), Home(tmp_path / "home")).facts)
    assert (plan.processes, plan.tokens_per_step) == (2, 2 * 2 * 2 * 32)
    assert plan.steps_total == 3 * plan.steps_per_epoch == 3 * steps_in_epoch(plan.sequences, 2, 4)


@pytest.mark.parametrize("size", ["1.0b", "1.2b", "1.4b"])
def test_presets_are_called_what_they_are(size):
    from transformers import AutoModelForCausalLM

    from nightschool.models.build import build_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(f"new:neox-{size}", 50_257))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e9:.1f}b" == size
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.max_position_embeddings) == (2048, 16, 2048)
    assert (config.intermediate_size, config.use_parallel_residual, config.tie_word_embeddings) == (8192, True, False)


def test_a_loss_that_is_no_number_names_shard_and_token(tmp_path, corpus):
    with pytest.raises(NonFiniteLoss, match=r"step \d+ \(epoch 0, sequence \d+: tokens_0000\d\.npz, token \d+\)"):
        pretrain(Home(tmp_path / "home"), corpus, train={"learning_rate": 1e30, "max_grad_norm": 0.0})


def test_bad_input_is_refused_before_step_1(tmp_path, corpus):
    home = Home(tmp_path / "home")

    def prepare(**changes):
        return Pretrain.prepare(Setup(Recipe.model_validate(recipe_of(corpus, **changes)), home, Path.cwd()))

    with pytest.raises(ModelError, match="max_position_embeddings"):
        prepare(shape={"max_position_embeddings": 16})
    other = tmp_path / "other"
    from nightschool.data.tokenizer import train_bpe

    train_bpe(["something else entirely"], 280).save_pretrained(other)
    with pytest.raises(DataError, match="were written with the tokenizer"):
        prepare(tokenizer=str(other))
    bare = tmp_path / "bare"
    bare.mkdir()
    np.savez(bare / "a.npz", input_ids=np.arange(400, dtype=np.int32) % 250)
    with pytest.raises(ModelError, match="no tokenizer beside the shards"):
        prepare(data=[{"path": str(bare)}])
    np.savez(bare / "a.npz", input_ids=np.arange(400, dtype=np.int32))
    tokenizer().save_pretrained(tmp_path / "own")
    with pytest.raises(DataError, match="token id 399"):
        prepare(data=[{"path": str(bare)}], tokenizer=str(tmp_path / "own"))
    with pytest.raises(DataError, match="2 sources"):
        prepare(data=[{"path": "a"}, {"path": "b"}])
    with pytest.raises(DataError, match="`dataset` names questions with answers"):
        prepare(data=[{"dataset": "gsm8k"}])
    for name, remedy, changes in (
        ("held_out.path is mine.txt", "held_out.share", {"held_out": {"path": "mine.txt"}}),
        ("held_out.min_examples is 5", "held_out.share: 0", {"held_out": {"min_examples": 5}}),
        ("train.tokens_per_batch is 64", "write train.batch_size", {"train": {"tokens_per_batch": 64}}),
        ("train.num_workers is 3", "takes all processors", {"train": {"num_workers": 3}}),
        ("replay.ratio is 2.0", "leave it out", {"replay": {"ratio": 2.0}}),
        ("data.0.format is text", "shards have one", {"data": [{"path": str(corpus), "format": "text"}]}),
        ("data.0.repeat is 2", "train.epochs", {"data": [{"path": str(corpus), "repeat": 2}]}),
        ("lora.r is 4", "all weights learn", {"lora": {"r": 4}}),
    ):
        with pytest.raises(UsageError, match=re.escape(f"{name}, and method: pretrain has no use for it: ")) as refused:
            prepare(**changes)
        assert remedy in str(refused.value)


def test_settings_of_pretraining_are_refused_elsewhere():
    with pytest.raises(ValueError, match="take it out"):
        Recipe.model_validate({"base": "x", "data": [{"path": "a"}], "pretrain": {"max_files": 3}})


def test_a_process_that_sees_other_shards_than_the_first_is_refused(tmp_path, corpus):
    class Elsewhere(World):
        def from_first(self, value):
            return f"other than {value}"

    with pytest.raises(DataError, match="sees other shards"):
        Pretrain.prepare(Setup(Recipe.model_validate(recipe_of(corpus)), Home(tmp_path), Path.cwd(), world=Elsewhere()))


def test_a_shape_that_cannot_be_built_is_refused_by_name(tmp_path, corpus):
    recipe = Recipe.model_validate(recipe_of(corpus, shape={"hidden_size": 100, "num_attention_heads": 3}))
    with pytest.raises(ModelError, match=r"gpt_neox.*hidden_size.*divisible"):
        Pretrain.prepare(Setup(recipe, Home(tmp_path), Path.cwd()))


@pytest.mark.trains
def test_it_overfits_one_sequence_and_writes_it_greedily(tmp_path):
    write_shards(tmp_path, count=1, words=16, shard_tokens=4096)
    home = Home(tmp_path / "home")
    home.ensure()
    run = pretrain(
        home,
        tmp_path,
        held_out={"share": 0},
        train={"max_steps": 60, "batch_size": 1, "accumulation_steps": 1, "learning_rate": 2e-2, "max_seq_len": 16},
    )
    assert list(read_events(run.metrics_path))[-1]["loss"] < 0.1
    recipe = Recipe.model_validate(recipe_of(tmp_path, train={"max_seq_len": 16}, held_out={"share": 0}))
    room = Pretrain.prepare(Setup(recipe, home, Path.cwd()))
    from nightschool.models.load import load_base
    from nightschool.training.continuation import greedy_continuation

    model = load_base(Registry(home).resolve(run.status.candidate).ref, home).model
    ids = room.task.batches.get(0, 0, 1).input_ids[0].tolist()
    assert greedy_continuation(model, ids[:4], 8) == ids[4:12]


def test_a_plan_of_a_model_that_is_too_slow_to_measure_says_so(tmp_path, corpus, monkeypatch):
    from nightschool.training.planning import speed

    recipe = Recipe.model_validate(recipe_of(corpus))
    assert "3 measured" in speed.Probe(make_plan(recipe, Home(tmp_path)).facts["measured_batches"], 1.0).how
    monkeypatch.setattr(speed, "LONGEST_BATCH_SECONDS", 0.0)
    plan = SimpleNamespace(**make_plan(recipe, Home(tmp_path)).facts)
    assert plan.measured_batches == 0
    assert plan.model_flops_utilization == pytest.approx(1.0, rel=0.3)
    assert "nothing was measured" in speed.Probe(0, 1.0).how


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("hidden_size", 32),
        ("intermediate_size", 48),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 8),
        ("max_position_embeddings", 64),
        ("tie_word_embeddings", True),
    ],
)
def test_each_field_of_a_shape_shapes_the_model(tmp_path, corpus, field, value):
    base = "new:tiny-llama"  # it has every one of them but those of experts
    plain = recipe_of(corpus, base=base, shape={}, train={"max_seq_len": 16})
    models = [
        Pretrain.prepare(
            Setup(Recipe.model_validate(plain | {"shape": shape}), Home(tmp_path), Path.cwd())
        ).loaded.model
        for shape in ({}, {field: value})
    ]
    configs = [getattr(model.config, field) for model in models]
    assert configs[1] == value != configs[0]
    if field != "max_position_embeddings":
        assert [tuple(p.shape) for p in models[0].parameters()] != [tuple(p.shape) for p in models[1].parameters()]
