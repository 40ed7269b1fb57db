import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nightschool.checkpoint_writer import commit
from nightschool.errors import Damaged, DiskFull, MadeByNewer, NotFound, StateMismatch
from nightschool.events import read_events
from nightschool.jobs.bitwise import compare_checkpoints
from nightschool.layers.expert_balance import ExpertBalance
from nightschool.store import atomic, checkpoints
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import recipe_yaml
from nightschool.training.checkpoint import full_state, rng
from nightschool.training.checkpoint.full_state import REQUIRED
from nightschool.training.optimizer import Schedule
from nightschool.training.state import TrainState
from tests.support.documents import ARCHITECTURES
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, differing, lora_for

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


EXACT = (
    "step",
    "epoch",
    "loss",
    "heldout_loss",
    "token_accuracy",
    "heldout_token_accuracy",
    "tokens_trained",
    "tokens_trained_total",
    "learning_rate",
    "grad_norm",
    "load_balancing_loss",
    "expert_router_entropy",
    "dead_experts",
)


def rows_of(run):
    return [[row.get(key) for key in EXACT] for row in read_events(run.run.metrics_path)]


def assert_equal_runs(straight, resumed):
    """0 tensors lost, and every bit the same: weights, optimizer, random state, position, history."""
    compared = compare_checkpoints(straight.saved[-1], resumed.saved[-1])
    assert compared.differences == ()
    assert compared.num_tensors > 0
    assert rows_of(straight) == rows_of(resumed)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, architecture, method):
    """Stopped in the middle of epoch 0 and again in the middle of epoch 1, two micro-batches a step."""
    lora = lora_for(architecture) if method == "lora" else None
    straight = MiniRun(tmp_path / "straight", architecture, lora=lora).go()
    assert straight.state.step == 10
    first = MiniRun(tmp_path / "parts", architecture, lora=lora).go(stop_after=3)
    second = MiniRun(tmp_path / "parts", architecture, lora=lora).go(resume=first.saved[-1], stop_after=4)
    assert (second.state.step, second.state.epoch, second.state.batch_index) == (7, 1, 4)
    third = MiniRun(tmp_path / "parts", architecture, lora=lora).go(resume=second.saved[-1])
    assert_equal_runs(straight, third)


def test_a_fresh_start_in_place_of_a_resume_would_be_noticed(tmp_path):
    """The twin of the test above: weights alone are not enough."""
    straight = MiniRun(tmp_path / "straight", "tiny-qwen3").go()
    first = MiniRun(tmp_path / "parts", "tiny-qwen3").go(stop_after=3)
    resumed = MiniRun(tmp_path / "parts", "tiny-qwen3")
    load = full_state.load

    def weights_only(folder, task, *rest):
        full_state.load_weights(folder, task)
        return TrainState.from_json(json.loads((folder / "state.json").read_text())["train"])

    try:
        full_state.load = weights_only
        resumed.go(resume=first.saved[-1])
    finally:
        full_state.load = load
    assert differing(straight.weights, resumed.weights)


def test_experts_are_balanced_by_the_loads_of_the_step_before_the_stop(tmp_path, monkeypatch):
    """The twin for a mixture: without the loads its routers learn something else."""
    straight = MiniRun(tmp_path / "straight", "tiny-qwen3-moe").go()
    first = MiniRun(tmp_path / "parts", "tiny-qwen3-moe").go(stop_after=3)
    resumed = MiniRun(tmp_path / "parts", "tiny-qwen3-moe")
    monkeypatch.setattr(ExpertBalance, "load_state", lambda self, facts: None)
    resumed.go(resume=first.saved[-1])
    assert differing(straight.weights, resumed.weights)


def test_dropout_goes_on_where_it_stopped(tmp_path):
    """The twin for random state: with another state the adapter learns something else."""
    straight = MiniRun(tmp_path / "straight", "tiny-llama", lora=LORA).go()
    first = MiniRun(tmp_path / "parts", "tiny-llama", lora=LORA).go(stop_after=3)
    resumed = MiniRun(tmp_path / "parts", "tiny-llama", lora=LORA)
    restore = rng.restore
    try:
        rng.restore = lambda plain, tensors: None
        resumed.go(resume=first.saved[-1])
    finally:
        rng.restore = restore
    assert differing(straight.weights, resumed.weights)


def test_a_run_resumed_from_an_earlier_checkpoint_replaces_the_later_ones(tmp_path):
    run = MiniRun(tmp_path).go()
    five, ten = run.saved
    before = [(path / "manifest.json").read_bytes() for path in run.saved]
    again = MiniRun(tmp_path).go(resume=five)
    assert again.saved == [ten]
    assert (five / "manifest.json").read_bytes() == before[0]
    assert (ten / "manifest.json").read_bytes() != before[1]
    assert [row["step"] for row in read_events(run.run.metrics_path)] == list(range(1, 11))


def resume(run, folder, **changes):
    """Load a checkpoint into a run that was prepared for it, with some of the context changed."""
    return load(run.fresh, folder, **changes)


def load(prepared, folder, **changes):
    schedule = changes.pop("schedule", prepared.schedule)
    context = replace(prepared.checkpoint_context(recipe_yaml(prepared.recipe.as_plain())), **changes)
    return full_state.load(folder, prepared.task, context, schedule)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with deterministic_threads():
        run = MiniRun(tmp_path_factory.mktemp("run")).go(stop_after=3)
        run.fresh = run.prepared()
        return run


def copied(saved, tmp_path):
    return shutil.copytree(saved.saved[0], tmp_path / saved.saved[0].name)


def test_it_is_whole_before_it_is_damaged(saved, tmp_path):
    assert resume(saved, copied(saved, tmp_path)).step == 3


@pytest.mark.parametrize("name", [*REQUIRED, "metadata.json", "training_metrics.json"])
@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped"])
def test_a_file_that_was_altered_is_refused_by_name(saved, tmp_path, name, how):
    folder = copied(saved, tmp_path)
    content = (folder / name).read_bytes()
    if how == "deleted":
        (folder / name).unlink()
    elif how == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        resume(saved, folder)


def test_a_checkpoint_without_manifest_does_not_exist(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(NotFound):
        resume(saved, folder)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_file_that_was_never_written_is_refused_even_if_the_manifest_agrees(saved, tmp_path, name):
    folder = copied(saved, tmp_path)
    for path in (folder / name, folder / "manifest.json"):
        path.unlink()
    write_manifest(folder)
    with pytest.raises(StateMismatch, match=name.replace(".", r"\.")):
        resume(saved, folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedule": Schedule(2e-2, 10, warmup_steps=2)}, "schedule peak.*0.01.*0.02"),
        ({"schedule": Schedule(1e-2, 20, warmup_steps=2)}, "schedule steps_total.*10.*20"),
        ({"dtype": "bf16"}, "dtype.*fp32.*bf16"),
        ({"numerics": {"train.accumulation_steps": 4}}, "train.accumulation_steps.*2.*4"),
        ({"base_fingerprint": "abc"}, "base fingerprint.*None.*abc"),
    ],
)
def test_another_recipe_is_refused_with_both_values(saved, tmp_path, changes, named):
    with pytest.raises(StateMismatch, match=named):
        resume(saved, copied(saved, tmp_path), **changes)


def test_other_data_are_refused(saved, tmp_path):
    with pytest.raises(StateMismatch, match="data fingerprint"):
        load(MiniRun(tmp_path / "fresh", batch_size=3).prepared(), copied(saved, tmp_path))


def test_another_model_is_refused_by_the_names_of_its_tensors_and_left_as_it_was(saved, tmp_path):
    fresh = MiniRun(tmp_path / "fresh", "tiny-llama").prepared()
    fresh.task.optimizer_facts = saved.fresh.task.optimizer_facts
    before = {name: tensor.clone() for name, tensor in fresh.task.saved_tensors().items()}
    with pytest.raises(
        StateMismatch, match=r"missing: lm_head\.weight.*unexpected: model\.layers\.0\.self_attn\.k_norm"
    ):
        load(fresh, copied(saved, tmp_path))
    assert not differing(before, fresh.task.saved_tensors())


def test_an_adapter_on_another_base_is_refused(tmp_path):
    run = MiniRun(tmp_path, lora=LORA).go(stop_after=2)
    other = run.prepared()
    frozen = next(p for p in other.task.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen[0, 0] += 1e-6
    with pytest.raises(StateMismatch, match="base fingerprint"):
        load(other, run.saved[-1])


def test_an_adapter_checkpoint_holds_the_adapter_only(tmp_path):
    run = MiniRun(tmp_path, "tiny-llama", lora=LORA).go(stop_after=2)
    weights = load_file(run.saved[-1] / "model.safetensors")
    assert weights
    assert all(".lora_" in name for name in weights)


def test_metadata_tells_what_people_ask(saved):
    metadata = json.loads((saved.saved[0] / "metadata.json").read_text())
    assert {
        "step", "epoch", "current_loss", "best_loss", "loss_history", "learning_rates", "validation_metrics",
        "training_progress", "system_info", "files_processed", "timestamp", "model_config",
    } <= metadata.keys()  # fmt: skip
    assert metadata["step"] == 3
    assert len(metadata["loss_history"]) == len(metadata["learning_rates"]) == 3
    assert metadata["best_loss"] == min(metadata["loss_history"])
    assert metadata["training_progress"]["completed_steps"] == 3
    assert (
        json.loads((saved.saved[0] / "training_metrics.json").read_text())["current_loss"] == metadata["current_loss"]
    )


def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path, monkeypatch):
    run = MiniRun(tmp_path)
    write = commit.write_file

    def full(path, pieces):
        if "step10" in str(path) and "optimizer" in str(path):
            raise DiskFull("There is no room; what was stored before is still whole.")
        return write(path, pieces)

    monkeypatch.setattr(commit, "write_file", full)
    with pytest.raises(DiskFull, match="still whole"):
        run.go()
    assert [point.step for point in checkpoints.ls(run.run)] == [5]
    monkeypatch.setattr(commit, "write_file", write)
    resumed = MiniRun(tmp_path).go(resume=checkpoints.ls(run.run)[0].path)
    straight = MiniRun(tmp_path / "straight", "tiny-qwen3").go()
    assert not differing(straight.weights, resumed.weights)


def test_a_crash_while_saving_leaves_no_checkpoint_under_its_name(tmp_path, monkeypatch):
    def crash(folder):
        raise KeyboardInterrupt

    run = MiniRun(tmp_path)
    monkeypatch.setattr(atomic, "sync_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert checkpoints.ls(run.run) == []


def test_random_state_of_another_number_of_gpus_is_refused(monkeypatch):
    plain, tensors = rng.capture()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StateMismatch, match="1 GPUs, and this machine shows 2"):
        rng.restore(plain, tensors | {"cuda.0": tensors["torch"]})


def test_random_state_comes_back_exactly():
    rng.seed_everything(5)
    plain, tensors = rng.capture()
    plain = json.loads(json.dumps(plain))

    def draw():
        import random

        import numpy as np

        return [random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()]

    first = draw()
    rng.restore(plain, tensors)
    assert draw() == first


def resealed(folder, **changes):
    """Change state.json, and let the manifest agree."""
    if changes:
        plain = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(plain | changes))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return folder


def test_a_checkpoint_of_the_first_format_is_read(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for name in ("training_config.json", "metadata.json"):
        (folder / name).unlink()
    assert resume(saved, resealed(folder, format=1)).step == 3


def test_a_checkpoint_of_a_newer_version_is_refused_as_that(saved, tmp_path):
    folder = resealed(copied(saved, tmp_path), format=3, something_new=True)
    with pytest.raises(MadeByNewer, match="has the format 3, and this version of nightschool reads up to 2"):
        resume(saved, folder)


def test_an_index_that_names_a_file_elsewhere_is_refused(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match="lies elsewhere"):
        resume(saved, resealed(folder))


@pytest.mark.parametrize("name", ["state.json", "optimizer.json"])
def test_json_that_is_nested_too_deeply_is_damage(saved, tmp_path, name):
    folder = copied(saved, tmp_path)
    (folder / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(Damaged, match=rf"{name} is not JSON \(it is nested too deeply\)"):
        resume(saved, resealed(folder))


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_damage(saved, tmp_path, content):
    folder = copied(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(Damaged, match=r"model\.safetensors\.index\.json"):
        resume(saved, resealed(folder))


def test_the_recipe_and_every_documented_figure_are_there_as_json(saved, tmp_path):
    """Rows 004-20 to 004-22."""
    folder = saved.saved[0]
    assert json.loads((folder / "training_config.json").read_text()) == saved.run.recipe()
    metadata = json.loads((folder / "metadata.json").read_text())
    metrics = json.loads((folder / "training_metrics.json").read_text())
    documented = {
        "step", "epoch", "current_loss", "best_loss", "loss_history", "learning_rates", "validation_metrics", "timestamp",
    }  # fmt: skip
    assert documented <= metrics.keys()
    assert documented | {
        "training_progress", "system_info", "files_processed", "model_config", "training_config_summary",
        "additional_metadata",
    } <= metadata.keys()  # fmt: skip
    assert {"current_avg_loss", "steps_since_best", "loss_trend"} <= metadata["validation_metrics"].keys()
    assert {"completed_steps", "total_epochs", "files_processed"} <= metadata["training_progress"].keys()
    assert {"cuda_available", "device_count", "mixed_precision"} <= metadata["system_info"].keys()
    assert metadata["validation_metrics"]["training_completed"] is False
    last = MiniRun(tmp_path).go().saved[-1]
    final = json.loads((last / "metadata.json").read_text())["validation_metrics"]
    assert final["training_completed"] is True
    assert final["total_steps"] == 10
    assert {"final_loss", "best_loss_achieved", "total_epochs", "average_loss", "loss_std"} <= final.keys()
