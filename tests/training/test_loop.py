import itertools
import json
import math

import pytest
import torch

from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered
from nightschool.errors import Interrupted, ModelError, NonFiniteLoss, NothingToTrain
from nightschool.evaluation.heldout import heldout_loss
from nightschool.events import read_events
from nightschool.models.build import build_model
from nightschool.store import checkpoints
from nightschool.training.continuation import greedy_continuation
from nightschool.training.loop import fit, steps_in_epoch
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.metrics import MetricsLog, truncate_after
from nightschool.training.optimizer import Schedule
from nightschool.training.state import Budget, TrainState
from nightschool.units import Every
from nightschool.work.stop import Stop
from tests.support.documents import ARCHITECTURES
from tests.support.training_setups import (
    LORA,
    VOCAB_SIZE,
    MiniRun,
    deterministic_threads,
    lora_for,
    make_task,
    random_documents,
)

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def train(task, tmp_path, *, steps, rate=1e-2, accumulation_steps=1, **more):
    settings = {
        key: more.pop(key) for key in ("log_every", "evaluate_every", "save_every", "max_grad_norm") if key in more
    }
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    try:
        state = fit(
            task,
            TrainState(task.fingerprint),
            Budget(steps, accumulation_steps=accumulation_steps, **settings),
            schedule=Schedule(rate, steps, "constant"),
            metrics=metrics,
            **more,
        )
    finally:
        metrics.close()
    return state, list(read_events(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("lora", [None, LORA.model_copy(update={"dropout": 0.0})], ids=["full", "lora"])
def test_accumulating_small_batches_is_one_large_batch(tmp_path, lora):
    """The documents carry 3 to 13 trained tokens each, so a mean of means would differ."""
    documents = random_documents(8)
    small = make_task(lora=lora, documents=documents, batch_size=2)
    large = make_task(lora=lora, documents=documents, batch_size=8)
    state_small, rows_small = train(small, tmp_path / "small", steps=1, accumulation_steps=4)
    state_large, rows_large = train(large, tmp_path / "large", steps=1)
    assert rows_small[0]["loss"] == pytest.approx(rows_large[0]["loss"], rel=1e-5)
    assert rows_small[0]["grad_norm"] == pytest.approx(rows_large[0]["grad_norm"], rel=1e-4)
    assert state_small.tokens_trained == state_large.tokens_trained == sum(d.trained_tokens for d in documents)
    # Not the weights: Adam divides by the gradient's own size, and where that is almost 0 rounding decides on the sign of
    # a whole step. The first moment is the gradient, but for a factor.
    moments, expected = small.optimizer.state(), large.optimizer.state()
    compared = [name for name in expected if name.startswith("first_moment.")]
    assert len(compared) == len(small.trainable())
    for name in compared:
        assert (moments[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-8, name


def test_a_mean_of_means_would_be_noticed(tmp_path):
    """The twin of the test above: what it compares really differs between micro-batches."""
    documents = random_documents(8)
    task = make_task(documents=documents, batch_size=2)
    counts = {task.batch(0, index).tokens_trained for index in range(4)}
    losses = [task.loss(task.batch(0, index)) for index in range(4)]
    means = [float(loss.sum.detach()) / loss.units for loss in losses]
    true = sum(float(loss.sum.detach()) for loss in losses) / sum(loss.units for loss in losses)
    assert len(counts) > 1
    assert abs(sum(means) / 4 - true) > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adding_padding_changes_neither_loss_nor_gradients(architecture):
    """Packed rows against one document a row padded to the longest, computed by plain transformers."""
    task = make_task(architecture, batch_size=6)
    batch = task.batch(0, 0)
    packed = task.loss(batch)
    packed.sum.backward()
    packed_gradients = {name: p.grad.clone() for name, p in task.trainable().items()}

    plain = build_model(architecture, VOCAB_SIZE, seed=1).train()
    bounds = batch.cu_seqlens.tolist()
    total, longest = torch.zeros(()), max(b - a for a, b in itertools.pairwise(bounds)) + 5
    for a, b in itertools.pairwise(bounds):
        ids = torch.zeros(1, longest, dtype=torch.long)
        ids[0, : b - a] = batch.input_ids[0, a:b]
        mask = (torch.arange(longest) < b - a).long()[None]
        logits = plain(input_ids=ids, attention_mask=mask).logits[0, : b - a].double()
        nll = torch.nn.functional.cross_entropy(logits, batch.labels[0, a:b], ignore_index=-100, reduction="none")
        total = total + (nll * batch.weights[0, a:b]).sum()
    total.backward()
    assert packed.sum.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(packed_gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_trainable_parameter_gets_a_gradient(architecture, method):
    lora = lora_for(architecture) if method == "lora" else None
    task = make_task(architecture, lora=lora, documents=random_documents(60), batch_size=60)
    if lora is not None:  # lora_B begins at zero, and with it the gradient of lora_A
        with torch.no_grad():
            for name, parameter in task.trainable().items():
                parameter += 0.01 * torch.randn_like(parameter) if "lora_B" in name else 0
    task.loss(task.batch(0, 0)).sum.backward()
    without = [name for name, p in task.trainable().items() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_the_model_overfits_one_example_and_repeats_its_answer_greedily(tmp_path):
    question, answer = [5, 9, 2, 40], [33, 7, 61, 12, 1]
    document = Rendered(question + answer, [0.0] * 4 + [1.0] * 5, ["user"] * 4 + ["assistant"] * 5)
    task = make_task(documents=[document], batch_size=1)
    _, rows = train(task, tmp_path, steps=60)
    assert rows[-1]["loss"] < 0.01
    assert greedy_continuation(task.model, question, 5) == answer


def test_weights_scale_the_loss_of_a_token(tmp_path):
    """A token of weight 0.5 adds half its loss, and counts as one token."""
    whole = Rendered([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0], ["user"] * 4)
    half = Rendered([1, 2, 3, 4], [0.0, 1.0, 1.0, 0.5], ["user"] * 4)
    without = Rendered([1, 2, 3, 4], [0.0, 1.0, 1.0, 0.0], ["user"] * 4)
    sums = [
        make_task(documents=[document]).loss(make_task(documents=[document]).batch(0, 0))
        for document in (whole, half, without)
    ]
    a, b, c = (float(loss.sum.detach()) for loss in sums)
    assert b == pytest.approx((a + c) / 2, rel=1e-6)
    assert [loss.units for loss in sums] == [3, 3, 2]


def test_a_window_never_crosses_an_epoch_and_max_steps_may_exceed_the_epochs(tmp_path):
    task = make_task(documents=random_documents(10), batch_size=2)  # 5 micro-batches an epoch
    assert steps_in_epoch(5, 2) == 3
    state, rows = train(task, tmp_path, steps=7, accumulation_steps=2)
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 2]
    assert (state.epoch, state.batch_index) == (2, 2)
    assert state.tokens_consumed == 2 * task.batches.tokens + sum(task.batch(2, i).input_ids.shape[1] for i in (0, 1))


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """One step of plain SGD-like size: with clipping to almost nothing Adam's moments stay almost nothing."""
    free, clipped = make_task(), make_task()
    _, rows = train(free, tmp_path / "free", steps=1, max_grad_norm=0.0)
    train(clipped, tmp_path / "clipped", steps=1, max_grad_norm=1e-3)
    norm = rows[0]["grad_norm"]
    assert norm > 1e-2
    for name, moment in clipped.optimizer.state().items():
        if name.startswith("first_moment"):
            torch.testing.assert_close(moment * norm / 1e-3, free.optimizer.state()[name], rtol=1e-3, atol=1e-6)


def test_a_row_says_what_happened(tmp_path):
    task = make_task()
    _, rows = train(task, tmp_path, steps=4, evaluate=lambda: 1.5, evaluate_every=Every(2, "steps"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("heldout_loss") for row in rows] == [None, 1.5, None, 1.5]
    for row in rows:
        assert set(row) - {"heldout_loss", "heldout_seconds"} == {
            "time", "step", "epoch", "loss", "tokens_per_second", "tokens_trained", "tokens_trained_total",
            "learning_rate", "grad_norm", "peak_bytes", "seconds", "token_accuracy",
        }  # fmt: skip
        assert row["peak_bytes"] > 10**6
        assert row["tokens_per_second"] > 0
    assert rows[-1]["tokens_trained_total"] == sum(row["tokens_trained"] for row in rows)


def test_a_row_of_several_steps_holds_their_mean_by_tokens(tmp_path):
    single, several = make_task(), make_task()
    _, each = train(single, tmp_path / "single", steps=6)
    _, grouped = train(several, tmp_path / "several", steps=6, log_every=4)
    assert [row["step"] for row in grouped] == [4, 6]
    four = each[:4]
    mean = sum(r["loss"] * r["tokens_trained"] for r in four) / sum(r["tokens_trained"] for r in four)
    assert grouped[0]["loss"] == pytest.approx(mean)
    assert grouped[0]["tokens_trained"] == sum(r["tokens_trained"] for r in four)


def test_evaluating_often_changes_nothing_in_the_training(tmp_path):
    """With dropout on: evaluation draws no random number and leaves the model in training mode."""
    rare = MiniRun(tmp_path / "rare", lora=LORA).go()
    often = MiniRun(tmp_path / "often", lora=LORA, evaluate_every="1 steps").go()
    assert often.state.heldout_steps == list(range(11))
    assert rare.state.loss_history == often.state.loss_history


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path, monkeypatch):
    accumulate, steps = FinetuneTask.accumulate, itertools.count(0)  # the plan computes as much as one step

    def spoiled(task, window, *arguments):
        loss = accumulate(task, window, *arguments)
        return loss * math.nan if len(window) == 2 and next(steps) == 8 else loss

    monkeypatch.setattr(FinetuneTask, "accumulate", spoiled)
    run = MiniRun(tmp_path)
    with pytest.raises(
        NonFiniteLoss, match=r"loss became nan in step 8 \(epoch 1, micro-batch 4\).*the one of step 5"
    ) as caught:
        run.go()
    assert "learning_rate" in str(caught.value)
    assert [point.step for point in checkpoints.ls(run.run)] == [5]
    assert [row["step"] for row in read_events(run.run.metrics_path)] == list(range(1, 8))


def test_a_gradient_that_is_not_finite_is_noticed_where_losses_are_logged_rarely(tmp_path):
    task = make_task()
    parameter = next(iter(task.trainable().values()))
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm became (nan|inf) in step 1 .*There is no checkpoint yet"):
        train(task, tmp_path, steps=10, log_every=5, save=lambda *_: pytest.fail("saved"), save_every=Every(3, "steps"))


def test_a_window_without_a_trained_token_is_refused(tmp_path):
    task = make_task()
    batch = task.batch
    task.batch = lambda epoch, index: type(b := batch(epoch, index))(**(vars(b) | {"tokens_trained": 0}))
    with pytest.raises(NothingToTrain, match="step 1"):
        train(task, tmp_path, steps=1)


def test_a_stop_finishes_the_step_and_saves(tmp_path):
    run = MiniRun(tmp_path).go(stop_after=3)
    assert run.state.step == 3
    assert [point.step for point in checkpoints.ls(run.run)] == [3]


def test_a_stop_before_step_1_saves_nothing(tmp_path):
    stop = Stop()
    stop.reason = "SIGINT"
    with pytest.raises(Interrupted, match="SIGINT stopped the run after step 0 of 5") as caught:
        train(make_task(), tmp_path, steps=5, stop=stop, save=lambda *_: pytest.fail("saved"))
    assert caught.value.exit_code == 75


def test_an_adapter_run_leaves_its_base_as_it_was(tmp_path):
    task = make_task("tiny-llama", lora=LORA)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters() if not p.requires_grad}
    train(task, tmp_path, steps=3)
    assert before
    assert all(torch.equal(before[name], p) for name, p in task.model.named_parameters() if name in before)


def test_a_model_in_which_nothing_learns_is_refused():
    model = build_model("tiny-qwen3", VOCAB_SIZE, seed=1).requires_grad_(False)
    with pytest.raises(ModelError, match="No parameter"):
        make_task(model=model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own look at .grad
def test_compiling_the_feed_forward_blocks_changes_no_number(tmp_path, monkeypatch):
    """With the compiler's own front end, but without its code generator, which needs a C++ compiler and half a minute."""
    compile_module = torch.nn.Module.compile
    compiled = []

    def eagerly(module, **settings):
        compiled.append(module)
        compile_module(module, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    _, plain = train(make_task("tiny-llama"), tmp_path / "plain", steps=3)
    assert not compiled
    _, faster = train(make_task("tiny-llama", compile=True), tmp_path / "compiled", steps=3)
    assert [type(module).__name__ for module in compiled] == ["LlamaMLP", "LlamaMLP"]
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in faster], rel=1e-5)


def test_recomputing_activations_changes_no_number(tmp_path):
    plain = MiniRun(tmp_path / "plain", lora=LORA).go()
    recomputed = MiniRun(tmp_path / "recomputed", lora=LORA, gradient_checkpointing=True).go()
    assert recomputed.prepared().task.model.get_base_model().is_activation_checkpointing
    assert plain.state.loss_history == pytest.approx(recomputed.state.loss_history, rel=1e-6)


def test_held_out_loss_depends_neither_on_batches_nor_on_dropout():
    documents = random_documents(12, seed=4)
    task = make_task(lora=LORA)
    task.model.train()
    values = [
        task.heldout_loss(Batches(documents, seed=seed, **size))
        for seed, size in ((0, {"batch_size": 1}), (1, {"batch_size": 12}), (2, {"tokens_per_batch": 30}))
    ]
    assert {tokens for _, tokens in values} == {sum(d.trained_tokens for d in documents)}
    assert [loss for loss, _ in values] == pytest.approx([values[0][0]] * 3, rel=1e-6)
    assert all(module.training for module in task.model.modules() if isinstance(module, torch.nn.Dropout))


def test_held_out_loss_leaves_a_served_model_as_it_was():
    model = build_model("tiny-qwen3", VOCAB_SIZE, seed=1).eval()
    before, state = model.config._attn_implementation, torch.get_rng_state()
    batches = Batches(random_documents(3), batch_size=3, seed=0)
    loss, tokens = heldout_loss(model, [batches.get(0, 0)])
    assert math.isfinite(loss)
    assert tokens == batches.tokens_trained
    assert model.config._attn_implementation == before
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 3} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    assert truncate_after(path, 3) == 2
    assert list(read_events(path)) == rows[:3]
    assert path.read_bytes().endswith(b"\n")


def test_tensorboard_lies_beside_from_step_1(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    for step in (1, 2):
        metrics.write({"step": step, "loss": 2.0 / step})
    metrics.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
