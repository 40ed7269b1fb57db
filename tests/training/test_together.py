"""Several runs in one process give what each gives alone, and none touches another."""

import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nightschool.config.recipe import Lora
from nightschool.errors import Interrupted, UsageError
from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.training.checkpoint.checkpoint_reader import load_group
from nightschool.training.methods.finetune import FinetuneTask
from nightschool.training.run_together import main
from nightschool.training.together import joint
from nightschool.training.together.joint import JointBase, JointPasses
from tests.support.training_setups import MiniRun, deterministic_threads, random_rows

pytestmark = pytest.mark.trains
LORA = Lora(r=4, alpha=8, dropout=0.2)
QUERIES_AND_VALUES = Lora(r=2, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def runs_of(folder, **settings):
    """A run a name, all in one home: each with data of its own."""
    home = Home(folder / "home").ensure()
    return {
        name: MiniRun(
            folder / name,
            home=home,
            rows=random_rows(20, seed=ord(name[0])),
            **({"steps_total": 6, "lora": LORA} | given),
        )
        for name, given in settings.items()
    }


def train_together(runs, resume=None):
    first = next(iter(runs.values()))
    members = [{"run": one.run.id, "resume": resume, "root": str(one.folder)} for one in runs.values()]
    file = first.home.path / "members.json"
    file.write_text(json.dumps(members))
    return main(["--home", str(first.home.path), "--members", str(file)])


def adapter_of(one):
    version = Registry(one.home).resolve(one.run.status.candidate)
    return load_file(version.path / "adapter_model.safetensors")


def first_moments_of(one):
    """Of its last checkpoint: the gradients of all its steps are in them, undivided."""
    state = load_group(checkpoints.ls(one.run)[-1].path, "optimizer")
    return {name: tensor for name, tensor in state.items() if name.startswith("first_moment.")}


def test_runs_that_share_their_passes_learn_what_each_learns_alone(tmp_path, monkeypatch):
    settings = {
        "short": {"steps_total": 3, "early_stopping": {"every": "2 steps"}},
        "broken": {"learning_rate": 1e30},
        "windows": {"accumulation_steps": 3, "batch_size": 1, "seed": 7, "lora": QUERIES_AND_VALUES},
        "poisoned": {"steps_total": 4},
    }
    together = runs_of(tmp_path / "together", **settings)
    alone = runs_of(tmp_path / "alone", **{name: settings[name] for name in ("short", "windows")})
    batch, losses, passes = FinetuneTask.batch, JointBase.losses, []

    def batch_with_a_word_too_many(task, epoch, place):
        found = batch(task, epoch, place)
        if place == 5 and "poisoned" in sys.stdout.name:
            found = replace(found, input_ids=found.input_ids + 10**6)
        return found

    def counted(base, parts):
        passes.append(len(parts))
        return losses(base, parts)

    out = sys.stdout
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTask, "batch", batch_with_a_word_too_many)
        patched.setattr(JointBase, "losses", counted)
        patched.setattr(joint, "pass_tokens", lambda _: 1000)
        assert train_together(together) == 0
    assert sys.stdout is out
    # Both batches of step 1 and the third one of `windows`; the NaN of `broken` is found after step 2; step 3 falls apart.
    assert passes[:6] == [4, 4, 1, 4, 4, 1]
    for name, solo in alone.items():
        solo.go()
        found, wanted = first_moments_of(together[name]), first_moments_of(solo)
        assert found.keys() == wanted.keys()
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-5, name
        assert max(float(tensor.abs().max()) for tensor in wanted.values()) > 1e-3
        rows, expected = (list(read_events(one.run.metrics_path)) for one in (together[name], solo))
        accuracies = [row["token_accuracy"] for row in expected]
        assert [row["token_accuracy"] for row in rows] == pytest.approx(accuracies, abs=0.05)  # a tie may fall apart
        assert max(accuracies) > 0.1
        checked, expected_checks = ([row["drift"] for row in of if "drift" in row] for of in (rows, expected))
        assert checked == pytest.approx(expected_checks, rel=0.05)
        assert len(checked) == (2 if name == "short" else 0)
        assert together[name].run.status.shares_process
        assert not solo.run.status.shares_process
        events = [[row["event"] for row in read_events(one.run.events_path)] for one in (together[name], solo)]
        # A process that others share has no peak of this run's own.
        assert events[0] == [event for event in events[1] if event != "measured"]
        log = together[name].run.log_path.read_text()
        assert f"Published {together[name].run.status.candidate}" in log
        assert all(other.run.id not in log for other in together.values() if other is not together[name])
    for name, why in (("broken", "became nan"), ("poisoned", "index out of range")):
        failed = together[name].run.status
        assert (failed.state, failed.exit_code, failed.candidate) == ("failed", 1, None)
        assert why in failed.error
        assert f"error: {failed.error}" in together[name].run.log_path.read_text()


def test_only_the_gradients_of_one_pass_are_held_at_once(tmp_path, monkeypatch):
    together = runs_of(tmp_path, one={"steps_total": 2}, two={"steps_total": 2}, three={"steps_total": 2})
    losses, tasks, holding = JointBase.losses, {}, []

    def counted(base, parts):
        tasks.update({id(part.seat.task): part.seat.task for part in parts})
        found = losses(base, parts)
        holding.append(sum(any(one.grad is not None for one in t.trainable().values()) for t in tasks.values()))
        return found

    monkeypatch.setattr(JointBase, "losses", counted)
    monkeypatch.setattr(joint, "pass_tokens", lambda _: 1)
    assert train_together(together) == 0
    assert len(tasks) == 3
    assert holding == [1] * 12  # two micro-batches a step


def test_one_is_stopped_alone_and_a_signal_stops_all(tmp_path, monkeypatch):
    """Neither has anybody to share passes with, so that both are what they are alone to the last bit."""
    settings = {"one": {"gradient_checkpointing": True}, "two": {"seed": 7}}
    together, alone = (runs_of(tmp_path / where, **settings) for where in ("together", "alone"))
    serve, served = JointPasses.serve, []

    def serve_and_interrupt(passes, members):
        served.append(len(members))
        if len(served) == 2:
            together["one"].run.request_stop("A pause")
        if len(served) == 4:
            signal.raise_signal(signal.SIGTERM)
        yield from serve(passes, members)

    with monkeypatch.context() as patched:
        patched.setattr(JointPasses, "serve", serve_and_interrupt)
        assert train_together(together) == Interrupted.exit_code
    assert served == [2, 2, 1, 1, 0]
    for name, reason, step in (("one", "A pause", 2), ("two", "SIGTERM", 4)):
        status = together[name].run.status
        assert (status.state, status.step, status.exit_code) == ("interrupted", step, 75)
        assert status.error.startswith(reason)
        assert together[name].run.stop_request is None
    assert train_together(together, resume="latest") == 0
    assert "not its passes: it recomputes activations" in together["one"].run.log_path.read_text()
    for name, solo in alone.items():
        solo.go()
        found, wanted = adapter_of(together[name]), adapter_of(solo)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_a_run_that_is_not_there_is_nobody_elses_affair(tmp_path, capfd):
    together = runs_of(tmp_path, one={"steps_total": 1})
    members = [
        {"run": "gone-20260101_000000", "root": "."},
        {"run": together["one"].run.id, "root": str(tmp_path / "one")},
    ]
    file = tmp_path / "members.json"
    file.write_text(json.dumps(members))
    assert main(["--home", str(together["one"].home.path), "--members", str(file)]) == 0
    assert together["one"].run.status.state == "completed"
    assert "gone-20260101_000000" in capfd.readouterr().err
    file.write_text('[{"resume": null}]')
    assert main(["--home", str(together["one"].home.path), "--members", str(file)]) == UsageError.exit_code
