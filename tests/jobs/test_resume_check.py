"""verify --resume: exact runs are called exact, others are not, and the run itself stays as it is."""

import hashlib
import json
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nightschool import uploads
from nightschool.cli.main import main
from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Damaged, DiskFull, Interrupted, NightschoolError
from nightschool.jobs import launch, resume_check
from nightschool.jobs.bitwise import compare_checkpoints
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.resume_check import check_resume
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.training import run as run_module
from nightschool.work.stop import Stop
from tests.support import toy_trainer
from tests.support.toy_trainer import train
from tests.support.training_setups import NUM_THREADS, deterministic_threads

STEPS = 12


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def quick(monkeypatch):
    """Train a toy in place of ours."""
    real = launch.subprocess.Popen

    def popen(words, **options):
        return real([sys.executable, toy_trainer.__file__, *words[3:]], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)


def make_run(home, *, saved=(4, 8, 12), **recipe):
    plain = {"name": "bot", "base": "new:tiny", "data": [{"path": "a.json"}], **recipe}
    run = RunStore(home).create(Recipe.model_validate(plain).as_plain(), name="bot")
    for step in saved:
        train(run, step - (checkpoints.ls(run)[-1].step if checkpoints.ls(run) else 0))
    run.update_status(state="completed", step=STEPS, steps_total=STEPS, candidate="bot@v")
    return run


def tree(folder):
    """Every file below a folder, with its content and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_that_resumes_exactly_is_called_exact_and_is_not_changed(home, quick, capsys):
    run = make_run(home)
    before = tree(home.path)
    assert main(["checkpoints", "verify", "--resume", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["exact"]
    # The last checkpoint leaves no room for steps, and the one before it too little for four.
    assert (verdict["checkpoint"], verdict["break_step"], verdict["last_step"]) == (
        "checkpoint-epoch0-step4-files1",
        6,
        8,
    )
    assert verdict["comparison"]["num_tensors"] == 2
    assert list(verdict["losses"]) == ["5", "6", "7", "8"]
    assert (verdict["recorded_equal"], verdict["recorded_different"]) == (4, 0)
    assert tree(home.path) == before
    assert [path.name for path in home.path.iterdir() if path.name.startswith(".")] == []
    assert main(["checkpoints", "verify", run.id, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "EXACT" in out
    assert "steps 5 to 6, saved; then, started anew, steps 7 to 8" in out
    assert "the very same loss in 4 of 4 steps" in out


def test_a_run_that_forgets_something_is_called_different(home, quick, capsys, monkeypatch):
    run = make_run(home)
    monkeypatch.setenv("FORGETS", "1")
    assert main(["checkpoints", "verify", f"{run.id}/checkpoint-epoch0-step8-files1", "--resume", "--steps", "3"]) == 1
    out = capsys.readouterr().out
    assert "differs        model: w: " in out
    assert "differs        optimizer: m: " in out
    assert "differs        state: moment: " in out
    assert "metrics of step 10" in out
    assert "DIFFERENT" in out
    assert "the very same loss in 0 of 3 steps" in out


def test_what_the_copy_reads_is_its_own(home, quick, monkeypatch):
    run = make_run(
        home, checkpoints={"every": "10m", "upload": {"url": "file:///tmp/nowhere"}}, train={"evaluate_every": "10m"}
    )
    (run.path / "new_examples.jsonl").write_text("{}\n")
    seen = []

    def look(copy, steps, around):
        recipe = copy.recipe()
        seen.append((copy.path, recipe["checkpoints"]["every"], recipe["train"]["evaluate_every"]))
        assert (copy.path / "new_examples.jsonl").exists()
        assert not (copy.path / "log.txt").exists()
        assert copy.status.candidate is None
        assert uploads.settings_of(copy) is None
        assert next(point.step for point in checkpoints.ls(copy)) == 4
        train(copy, steps)

    monkeypatch.setattr(resume_check, "_train", look)
    assert check_resume(run, steps=4).exact
    assert len(seen) == 3
    assert {(every, evaluate) for _, every, evaluate in seen} == {("1000000000 steps", None)}
    assert run.path not in {path for path, _, _ in seen}


def test_without_an_early_checkpoint_it_begins_at_step_0(home, quick, capsys):
    make_run(home, saved=(12,))
    assert main(["checkpoints", "verify", "--resume", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["checkpoint"], verdict["first_step"], verdict["last_step"]) == (None, 0, 4)


def test_what_cannot_be_checked_says_why(home, quick, capsys, monkeypatch):
    run = make_run(home)
    last = f"{run.id}/checkpoint-epoch0-step12-files1"
    assert main(["checkpoints", "verify", last, "--resume"]) == 1
    assert "has 12 steps, so 0 can be repeated from step 12" in capsys.readouterr().err
    assert main(["checkpoints", "verify", "--resume", "--steps", "1"]) == 2
    run.update_status(steps_total=None)
    with pytest.raises(Conflict, match="has not begun to train"):
        check_resume(run, steps=4)
    run.update_status(steps_total=STEPS)
    monkeypatch.setattr(resume_check.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskFull, match="10 are free"):
        check_resume(run, steps=4)
    damaged = checkpoints.ls(run)[1].path / "model.safetensors"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert main(["checkpoints", "verify", f"{run.id}/checkpoint-epoch0-step8-files1", "--resume"]) == 1
    assert "SHA-256" in capsys.readouterr().err


def test_a_process_that_fails_is_quoted_and_nothing_is_left(home, tmp_path, monkeypatch):
    run = make_run(home)
    real = launch.subprocess.Popen
    code = "print('error: The base has vanished. Fetch it again.'); raise SystemExit(4)"
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda words, **options: real([sys.executable, "-c", code], **options)
    )
    with pytest.raises(NightschoolError, match="The base has vanished"):
        check_resume(run, steps=4)
    assert not list(home.path.glob(".resume-check-*"))


def test_a_signal_ends_the_check_and_leaves_nothing(home, monkeypatch):
    run = make_run(home)
    real = launch.subprocess.Popen
    code = "import time; time.sleep(30)"
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda words, **options: real([sys.executable, "-c", code], **options)
    )
    stop = Stop()
    threading.Timer(0.5, lambda: stop.request("SIGINT")).start()
    with pytest.raises(Interrupted):
        check_resume(run, steps=4, around=CycleContext(stop=stop))
    assert not list(home.path.glob(".resume-check-*"))


def test_what_a_killed_check_left_is_swept_and_a_living_one_is_left(home, quick):
    run = make_run(home)
    left = home.path / ".resume-check-dead.partial"
    (left / "runs").mkdir(parents=True)
    with resume_check._scratch(home, 0) as living:
        assert check_resume(run, steps=4).exact
        assert living.is_dir()
    assert not left.exists()
    assert not living.exists()


@pytest.mark.usefixtures("warm_children")
def test_our_own_trainer_is_exact(home, capsys):
    """The real thing: a tiny GPT-NeoX, trained here, checked by three processes."""
    rows = [{"query": f"Where does {i} live?", "retrieved": f"{i} lives in {i % 5}."} for i in range(12)]
    (home.path.parent / "facts.json").write_text(json.dumps(rows))
    settings = {"epochs": 4, "batch_size": 2, "accumulation_steps": 2, "num_threads": NUM_THREADS, "dtype": "fp32"}
    plain = {
        "name": "bot",
        "base": "new:tiny-gpt-neox",
        "data": [{"path": "facts.json"}],
        "train": settings | {"learning_rate": 1e-3},
        "checkpoints": {"every": "3 steps"},
    }
    run = RunStore(home).create(Recipe.model_validate(plain).as_plain(), name="bot")
    words = ["--home", str(home.path), "--run", run.id, "--root", str(home.path.parent)]
    with deterministic_threads():
        assert run_module.main(words) == 0
    capsys.readouterr()
    before = tree(home.path)
    assert main(["checkpoints", "verify", "--resume", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["exact"]
    assert verdict["comparison"]["num_tensors"] > 50
    assert verdict["recorded_equal"] == 4
    assert tree(home.path) == before


def _folder(path, tensors, values):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "state.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("tensors", "values", "said"),
    [
        ({"a": np.float32([1, 2])}, {"x": 1}, None),
        ({"a": np.float32([1, 2])}, {"x": 1, "seconds": 5}, None),
        ({"a": np.float32([1, 2.0000002])}, {"x": 1}, "model: a: 1 of 8 bytes differ"),
        ({"a": np.float32([[1, 2]])}, {"x": 1}, "model: a: F32 [2] and F32 [1, 2]"),
        ({"a": np.float64([1, 2])}, {"x": 1}, "model: a: F32 [2] and F64 [2]"),
        ({"b": np.float32([1, 2])}, {"x": 1}, "model: a is only in the first"),
        ({"a": np.float32([1, 2])}, {"x": 2}, "state: x: 1 and 2"),
        ({"a": np.float32([1, 2])}, {"x": 1.0}, "state: x: 1 and 1.0"),
        ({"a": np.float32([1, 2])}, {}, 'state: x: 1 and "nothing"'),
    ],
)
def test_every_difference_is_named(tensors, values, said, tmp_path):
    first = _folder(tmp_path / "one", {"a": np.float32([1, 2])}, {"x": 1})
    found = compare_checkpoints(first, _folder(tmp_path / "two", tensors, values)).differences
    assert found == () if said is None else said in found


def test_zeros_of_both_signs_and_kinds_of_nan_are_different(tmp_path):
    first = _folder(tmp_path / "one", {"a": np.float32([0.0])}, {"x": 0.0})
    second = _folder(tmp_path / "two", {"a": np.float32([-0.0])}, {"x": -0.0})
    assert len(compare_checkpoints(first, second).differences) == 2


def test_tensors_in_several_parts_are_those_of_one_file(tmp_path):
    tensors = {"a": np.arange(5, dtype=np.float32), "b": np.arange(3)}
    first = _folder(tmp_path / "one", tensors, {})
    second = tmp_path / "two"
    second.mkdir()
    save_file({"a": tensors["a"]}, second / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"]}, second / "model-00002-of-00002.safetensors")
    (second / "model.safetensors.index.json").write_text("{}")
    (second / "state.json").write_text("{}")
    assert compare_checkpoints(first, second).differences == ()


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    first = _folder(tmp_path / "one", {"a": np.float32([1])}, {})
    (first / "rng.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(Damaged, match=r"rng\.safetensors"):
        compare_checkpoints(first, first)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory, content, place, change):
    folder = tmp_path_factory.mktemp("pair")
    other = bytearray(content)
    other[place % len(content)] ^= change
    first = _folder(folder / "one", {"a": np.frombuffer(content, np.uint8)}, {})
    second = _folder(folder / "two", {"a": np.frombuffer(bytes(other), np.uint8)}, {})
    assert compare_checkpoints(first, second).differences == (f"model: a: 1 of {len(content)} bytes differ",)
