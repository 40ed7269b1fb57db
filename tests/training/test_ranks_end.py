"""One of two processes that train together is ended by an error: a whole step is saved or nothing, all of them end, and each says which it was."""

import os
import signal

import pytest

from nightschool.jobs.resume_check import compare_checkpoints
from nightschool.store import checkpoints
from nightschool.store.manifest import read_manifest
from nightschool.training import run as run_module
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.optimizer import AdamW
from tests.support.ranks import run_ranks
from tests.support.training_setups import LORA, MiniRun

pytestmark = pytest.mark.trains

DROPOUT = LORA.model_copy(update={"dropout": 0.2})
# No checkpoint comes of itself before the end, and the figures of two steps are taken together.
SELDOM = {"recipe": {"checkpoints": {"background": False, "every": "99 steps"}}, "log_every": 3, "steps_total": 7}


def fail_in(rank, who, where, call):
    """In process `who`, let the `call`th call of the named method since the loop began end badly."""
    if rank != who:
        return
    calls, fit = [], run_module.fit

    def begun(*arguments, **named):
        calls.append(0)
        return fit(*arguments, **named)

    run_module.fit = begun
    owner, name = {"loss": (FinetuneTask, "loss"), "update": (AdamW, "step"), "kill": (FinetuneTask, "loss")}[where]
    method = getattr(owner, name)

    def failing(self, *arguments):
        if calls:
            calls[0] += 1
        if calls and calls[0] == call:
            if where == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if where == "update":
                method(self, *arguments)
            raise OSError("The file is gone.")
        return method(self, *arguments)

    setattr(owner, name, failing)


def fail_to_prepare(rank, who):
    def failing(*_, **__):
        raise OSError("There is no such base.")

    if rank == who:
        run_module.prepare = failing


def reasons(run):
    return [(point.step, read_manifest(point.path).facts[checkpoints.REASON]) for point in checkpoints.ls(run.run)]


def last_path(run):
    return checkpoints.ls(run.run)[-1].path


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two processes that nothing went wrong in. Dropout draws random numbers in each."""
    run = MiniRun(tmp_path_factory.mktemp("whole") / "straight", lora=DROPOUT, **SELDOM)
    codes, logs = run_ranks(run)
    assert codes == [0, 0], logs
    return run


# Five steps are made, and those since the third are not in the metrics yet.
@pytest.mark.parametrize("who", [0, 1])
def test_the_last_step_is_saved_with_the_random_states_of_all_and_a_resume_from_it_is_exact(who, straight, tmp_path):
    run = MiniRun(tmp_path / "run", lora=DROPOUT, **SELDOM)
    codes, logs = run_ranks(run, fail_in, who, "loss", 10)
    assert codes == [1, 1], logs
    assert f"Process {who} ended by OSError: The file is gone after step 5: its state is saved" in logs[0]
    assert f"Process {who} of this run ended by OSError: The file is gone, so no other can go on" in logs[1 - who]
    assert reasons(run) == [(5, "emergency")]
    if who == 1:
        assert "Process 1 of this run ended by OSError" in run.run.status.error
        assert run_ranks(run, resume="latest")[0] == [0, 0]
        compared = compare_checkpoints(last_path(straight), last_path(run))
        assert compared.differences == ()
        assert compared.num_tensors > 0


@pytest.mark.parametrize(
    ("where", "how", "said", "told"),
    [
        ("update", {}, "after step 2. Process 1 does not hold this step whole, so the state is not saved", "ended by OSError"),
        ("kill", {}, "Process 1 is gone without a word after step 1. What process 1 held is not known, so the state is not saved", "is gone without a word"),
        ("loss", {"zero_stage": 3}, "The processes share the weights among them, so the state is not saved", "ended by OSError"),
    ],
)  # fmt: skip
def test_what_is_not_whole_everywhere_is_not_saved_and_said(where, how, said, told, tmp_path):
    run = MiniRun(tmp_path / "run", **SELDOM, **how)
    codes, logs = run_ranks(run, fail_in, 1, where, 2 if where == "update" else 4)
    assert codes[0] == 1
    assert codes[1] == (-signal.SIGKILL if where == "kill" else 1)
    assert said in logs[0]
    assert "There is no checkpoint" in logs[0]
    assert f"Process 1 of this run {told}" in run.run.status.error
    assert reasons(run) == []


def test_a_process_that_does_not_come_to_the_first_step_is_named_too(tmp_path):
    run = MiniRun(tmp_path / "run")
    codes, logs = run_ranks(run, fail_to_prepare, 1)
    assert codes == [1, 1]
    assert "Process 1 of this run ended by OSError: There is no such base, so no other can go on" in logs[0]
    assert run.run.status.state == "failed"
