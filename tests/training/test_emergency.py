"""Why a checkpoint was saved, and what is saved of a run that an error ends: all of its last step, or nothing."""

from dataclasses import replace

import pytest
import torch

from nightschool.checkpoint_writer import commit
from nightschool.errors import DiskFull
from nightschool.events import read_events
from nightschool.jobs.lengthened import lengthened
from nightschool.jobs.outcome import CycleRecord
from nightschool.jobs.resume_check import compare_checkpoints
from nightschool.layers.expert_streaming.stream import ExpertStream
from nightschool.store import checkpoints
from nightschool.store.manifest import read_manifest
from nightschool.training.loop import fit
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.metrics import MetricsLog
from nightschool.training.optimizer import AdamW
from tests.support.training_setups import LORA, MiniRun, deterministic_threads

pytestmark = pytest.mark.trains

QUICK = {"background": False, "keep": {"last": 9}}
DROPOUT = LORA.model_copy(update={"dropout": 0.2})


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing went wrong in. Dropout draws random numbers in each micro-batch."""
    with deterministic_threads():
        return MiniRun(tmp_path_factory.mktemp("whole") / "straight", lora=DROPOUT).go()


def reasons(run):
    return [
        (point.step, read_manifest(point.path).facts[checkpoints.REASON], point.epoch)
        for point in checkpoints.ls(run.run)
    ]


def counter_of_training(monkeypatch):
    """Counts its calls, from where the steps begin: plans compute micro-batches, too."""
    calls = []

    def begun(*arguments, **named):
        calls.append(0)
        return fit(*arguments, **named)

    def count():
        if not calls:
            return 0
        calls[0] += 1
        return calls[0]

    monkeypatch.setattr("nightschool.training.run.fit", begun)
    return count


def break_data(monkeypatch):
    batch, count = FinetuneTask.batch, counter_of_training(monkeypatch)

    def failing(self, epoch, place):
        if count() == 8:  # the second of step 4
            raise OSError("The file is gone.")
        return batch(self, epoch, place)

    monkeypatch.setattr(FinetuneTask, "batch", failing)


def break_metrics(monkeypatch):
    write = MetricsLog.write

    def failing(self, row):
        if row["step"] == 3:
            raise OSError("Read-only file system")
        write(self, row)

    monkeypatch.setattr(MetricsLog, "write", failing)


def break_forward(monkeypatch, step=4):
    """Fail in the second micro-batch of a step, when the first has its gradients and has drawn its random numbers."""
    loss, count = FinetuneTask.loss, counter_of_training(monkeypatch)

    def failing(self, batch):
        if count() == 2 * step:
            raise RuntimeError("CUDA out of memory.")
        return loss(self, batch)

    monkeypatch.setattr(FinetuneTask, "loss", failing)


@pytest.mark.parametrize(
    ("break_it", "error"), [(break_data, OSError), (break_metrics, OSError), (break_forward, RuntimeError)]
)
def test_an_error_between_updates_saves_the_last_step_and_a_resume_from_it_is_exact(
    break_it, error, straight, tmp_path, monkeypatch, capsys
):
    run = MiniRun(tmp_path / "run", lora=DROPOUT)
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(error):
            run.go()
    assert reasons(run) == [(3, "emergency", 0)]
    assert "after step 3: its state is saved. Go on from it with --resume latest" in capsys.readouterr().out
    resumed = MiniRun(tmp_path / "run", lora=DROPOUT).go(resume=run.saved[-1])
    compared = compare_checkpoints(straight.saved[-1], resumed.saved[-1])
    assert compared.differences == ()
    assert compared.num_tensors > 0


def test_the_random_state_of_the_failed_step_would_be_noticed(straight, tmp_path, monkeypatch):
    """The twin of the test above: what the first micro-batch drew makes the rest of the run another."""
    monkeypatch.setattr("nightschool.training.state.Soundness.random_state", None)
    run = MiniRun(tmp_path / "run", lora=DROPOUT)
    with monkeypatch.context() as patch:
        break_forward(patch)
        with pytest.raises(RuntimeError):
            run.go()
    resumed = MiniRun(tmp_path / "run", lora=DROPOUT).go(resume=run.saved[-1])
    assert compare_checkpoints(straight.saved[-1], resumed.saved[-1]).differences != ()


def test_an_error_in_the_middle_of_an_update_saves_nothing_and_says_so(tmp_path, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def half(self, *arguments):
        step(self, *arguments)
        raise RuntimeError("The other half is lost.")

    run = MiniRun(tmp_path, recipe={"checkpoints": QUICK | {"every": "2 steps"}})
    update, count = AdamW.step, counter_of_training(monkeypatch)

    def third(self, *arguments):
        if count() == 3:
            monkeypatch.setattr(torch.optim.AdamW, "step", half)
        return update(self, *arguments)

    monkeypatch.setattr(AdamW, "step", third)
    with pytest.raises(RuntimeError, match="other half"):
        run.go()
    assert reasons(run) == [(2, "interval", 0)]
    said = capsys.readouterr().out
    assert (
        "in the middle of the update of step 3, so the state is not saved. The last checkpoint is that of step 2"
        in said
    )


def test_a_full_disk_lets_the_first_error_be_the_one_that_is_told(tmp_path, monkeypatch, capsys):
    def full(path, pieces):
        raise DiskFull("There is no room.")

    run = MiniRun(tmp_path)
    break_forward(monkeypatch)
    monkeypatch.setattr(commit, "write_file", full)
    with pytest.raises(RuntimeError, match="CUDA"):
        run.go()
    assert reasons(run) == []
    assert "could not be saved either: There is no room. There is no checkpoint" in capsys.readouterr().out


def test_a_full_disk_that_the_recipe_bears_is_told_as_well(tmp_path, monkeypatch, capsys):
    def full(path, pieces):
        raise DiskFull("There is no room.")

    run = MiniRun(tmp_path, recipe={"checkpoints": QUICK | {"on_full_disk": "continue"}})
    break_forward(monkeypatch)
    monkeypatch.setattr(commit, "write_file", full)
    with pytest.raises(RuntimeError, match="CUDA"):
        run.go()
    assert "its state could not be saved either" in capsys.readouterr().out


def test_weights_of_a_loss_that_is_none_are_never_saved(tmp_path, monkeypatch, capsys):
    """Losses are looked at when a row is due: the error that comes before finds one that is NaN."""
    run = MiniRun(tmp_path, log_every=5)
    loss, count = FinetuneTask.loss, counter_of_training(monkeypatch)

    def bad(self, batch):
        if (number := count()) == 8:
            raise OSError("The file is gone.")
        result = loss(self, batch)
        return replace(result, sum=result.sum * float("nan")) if number > 4 else result

    monkeypatch.setattr(FinetuneTask, "loss", bad)
    with pytest.raises(OSError, match="gone"):
        run.go()
    assert reasons(run) == []
    assert "could not be saved either: The loss became nan in step 3" in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 6])
def test_there_is_nothing_to_save_before_step_1_and_right_after_a_checkpoint(step, tmp_path, monkeypatch, capsys):
    run = MiniRun(tmp_path)
    break_forward(monkeypatch, step)
    with pytest.raises(RuntimeError):
        run.go()
    assert [step for step, _, _ in reasons(run)] == ([] if step == 1 else [5])
    assert "saved. Go on" not in capsys.readouterr().out


def test_a_run_that_ended_goes_on_for_another_epoch_as_if_it_had_been_asked_for(tmp_path):
    """With a rate that knows nothing of the end; a schedule that falls is from there on that of the longer run."""
    settings = {"lr_schedule": "constant", "warmup_steps": 0, "steps_total": None}
    asked = MiniRun(tmp_path / "straight", **settings).go()
    short = MiniRun(tmp_path / "short", epochs=1, **settings).go()
    record = CycleRecord("manual", str(tmp_path / "short"), short.run.recipe()["base"], None, "", 20)
    record.write(short.run)
    longer = MiniRun(tmp_path / "short")
    longer.run = lengthened(short.run, checkpoints.get(short.run, short.saved[-1].name), {"train.epochs": 2})
    longer.go(resume=short.saved[-1])
    assert compare_checkpoints(asked.saved[-1], longer.saved[-1]).differences == ()
    steps = [row["step"] for row in read_events(longer.run.metrics_path)]
    assert steps == [row["step"] for row in read_events(asked.run.metrics_path)]
    assert short.run.status.candidate is not None


def test_every_checkpoint_says_what_it_was_saved_for(tmp_path):
    recipe = {"checkpoints": QUICK | {"every": "2 steps", "each_epoch": True}}
    first = MiniRun(tmp_path, recipe=recipe).go(stop_after=3)
    run = MiniRun(tmp_path, recipe=recipe).go(resume=first.saved[-1])
    assert reasons(run) == [
        (2, "interval", 0), (3, "interrupted", 0), (4, "interval", 0), (5, "epoch", 1), (6, "interval", 1), (8, "interval", 1),
        (10, "final", 2),
    ]  # fmt: skip


def break_way_back(monkeypatch, call):
    """Fail where experts are loaded on the way back for the `call`th time: those of later layers have their gradients."""
    backward, count = ExpertStream.backward, counter_of_training(monkeypatch)

    def failing(self, layer, experts):
        if count() == call:
            raise RuntimeError("CUDA out of memory.")
        return backward(self, layer, experts)

    monkeypatch.setattr(ExpertStream, "backward", failing)


# Of two layers, in step 4: once for each of two micro-batches, or once for both.
@pytest.mark.parametrize(("tier", "call"), [("host", 16), ("disk", 8)])
def test_experts_that_pass_by_are_saved_as_after_the_last_step(tier, call, tmp_path, monkeypatch):
    """When the error comes, some experts have had what was put off of the last step, and gradients of the next one."""
    recipe = {"experts": {"tier": tier, "resident": 3}}
    straight = MiniRun(tmp_path / "straight", "tiny-qwen3-moe", recipe=recipe).go()
    run = MiniRun(tmp_path / "run", "tiny-qwen3-moe", recipe=recipe)
    with monkeypatch.context() as patch:
        break_way_back(patch, call)
        with pytest.raises(RuntimeError):
            run.go()
    assert reasons(run) == [(3, "emergency", 0)]
    resumed = MiniRun(tmp_path / "run", "tiny-qwen3-moe", recipe=recipe).go(resume=run.saved[-1])
    compared = compare_checkpoints(straight.saved[-1], resumed.saved[-1])
    assert compared.differences == ()
    assert compared.num_tensors > 0
