"""Several processes that train one model: the same learning, exact resume, any number of them after a resume, honest ends."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from nightschool.config.recipe import Recipe
from nightschool.errors import NightschoolError, UsageError
from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint.checkpoint_reader import group_files, load_group, open_group
from nightschool.training.distributed import world as world_module
from nightschool.training.distributed.world import _free_port
from tests.support.live_server import eventually
from tests.support.shard_setups import write_shards
from tests.training.test_pretrain import recipe_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("warm_children")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder)
    return folder


def plain_recipe(corpus, processes, **train):
    return recipe_of(corpus, pretrain={"sample_tokens": 0}, train={"num_processes": processes, **train})


def start(home, run, *, resume=None):
    arguments = ["--home", str(home.path), "--run", run.id]
    return subprocess.Popen(
        [sys.executable, "-m", "nightschool.training.run", *arguments, *(["--resume", resume] if resume else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=250)
    return process.returncode, output


def new_run(home, plain):
    home.ensure()
    return RunStore(home).create(plain, name="neox")


def rows_of(run):
    return {row["step"]: row for row in read_events(run.metrics_path)}


def last_checkpoint(run):
    return checkpoints.newest_whole(run).checkpoint.path


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """Two processes, twelve steps, undisturbed."""
    home = Home(tmp_path_factory.mktemp("straight") / "home")
    run = new_run(home, plain_recipe(corpus, 2))
    code, output = finish(start(home, run))
    assert code == 0, output
    return run


def test_two_processes_learn_what_one_learns_from_twice_the_batch(tmp_path, corpus, straight):
    home = Home(tmp_path / "home")
    run = new_run(home, plain_recipe(corpus, 1, batch_size=4))
    code, output = finish(start(home, run))
    assert code == 0, output
    one, two = rows_of(run), rows_of(straight)
    assert one.keys() == two.keys()
    for step in one:
        for key in ("loss", "heldout_loss", "grad_norm"):
            if key in one[step]:
                assert two[step][key] == pytest.approx(one[step][key], rel=2e-3)
        for key in ("tokens_trained", "tokens_trained_total", "learning_rate", "epoch"):
            assert two[step][key] == one[step][key]
    assert not (straight.path / "log-rank1.txt").read_text()


def test_stopped_and_resumed_by_two_and_once_by_one(tmp_path, corpus, straight):
    """2 → 2 is bitwise; then 2 → 1 goes on with the same data where the two stopped."""
    home = Home(tmp_path / "home")
    run = new_run(home, plain_recipe(corpus, 2))
    process = start(home, run)
    eventually(lambda: 4 in rows_of(run) if run.metrics_path.exists() else False, seconds=200)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    if code != 0:  # it may have been done already
        assert code == 75, output
        code, output = finish(start(home, run, resume="latest"))
    assert code == 0, output
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "rng-rank1.safetensors"):
        assert (last_checkpoint(run) / name).read_bytes() == (last_checkpoint(straight) / name).read_bytes()

    other = new_run(home, plain_recipe(corpus, 1, batch_size=4))
    code, output = finish(start(home, other, resume=with_checkpoint_of(other, straight, 6)))
    assert code == 0, output
    assert rows_of(other)[12]["tokens_trained_total"] == rows_of(straight)[12]["tokens_trained_total"]
    assert rows_of(other)[12]["loss"] == pytest.approx(rows_of(straight)[12]["loss"], rel=2e-3)


def with_checkpoint_of(run, other, step):
    """The run, with a checkpoint that another one saved; its name."""
    source = next(point for point in checkpoints.ls(other) if point.step == step)
    run.checkpoints_path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-r", str(source.path), str(run.checkpoints_path)], check=True)
    return source.name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, corpus, straight):
    """Two processes that share the weights between them, from a checkpoint of two that did not."""
    home = Home(tmp_path_factory.mktemp("sharded") / "home")
    run = new_run(home, plain_recipe(corpus, 2, zero_stage=3) | {"checkpoints": {"every": "3 steps"}})
    code, output = finish(start(home, run, resume=with_checkpoint_of(run, straight, 6)))
    assert code == 0, output + (run.path / "log-rank1.txt").read_text()
    return run


def test_sharded_processes_learn_the_same_and_each_saves_its_part(sharded, straight):
    for step in range(7, 13):
        assert rows_of(sharded)[step]["loss"] == pytest.approx(rows_of(straight)[step]["loss"], rel=1e-4)
    mine, theirs = last_checkpoint(sharded), last_checkpoint(straight)
    for stem in ("model", "optimizer"):
        assert group_files(mine, stem) == [f"{stem}-rank0.safetensors", f"{stem}-rank1.safetensors"]
        sizes = [(mine / name).stat().st_size for name in group_files(mine, stem)]
        assert 0.4 < sizes[0] / sum(sizes) < 0.6
        whole = load_group(theirs, stem)
        described = open_group(mine, stem).described()
        assert {name: (t.shape, t.dtype) for name, t in described.items()} == {
            name: (t.shape, t.dtype) for name, t in whole.items()
        }
        for name, tensor in load_group(mine, stem).items():
            assert torch.allclose(tensor, whole[name], rtol=1e-2, atol=1e-4), name
    assert sharded.status.candidate
    assert [row["step"] for row in read_events(sharded.events_path) if row["event"] == "checkpoint"] == [9, 12]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_checkpoint_loads_on_any_number_of_processes(tmp_path, corpus, sharded, processes):
    """The same number goes on bit for bit; one process alone learns the same from it."""
    home = Home(tmp_path / "home")
    how = {"zero_stage": 3} if processes == 2 else {"batch_size": 4}
    run = new_run(home, plain_recipe(corpus, processes, **how))
    code, output = finish(start(home, run, resume=with_checkpoint_of(run, sharded, 9)))
    assert code == 0, output
    mine, theirs = last_checkpoint(run), last_checkpoint(sharded)
    for stem in ("model", "optimizer"):
        whole = load_group(theirs, stem)
        found = load_group(mine, stem)
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            if processes == 2:
                assert torch.equal(tensor, whole[name]), name
            else:
                assert torch.allclose(tensor, whole[name], rtol=1e-2, atol=1e-4), name


def test_shards_of_an_adapter_are_refused(corpus):
    plain = recipe_of(corpus, method="lora", base="somewhere/else", shape={}, train={"zero_stage": 2})
    with pytest.raises(ValueError, match="zero_stage"):
        Recipe.model_validate(plain)


def test_a_process_that_never_began_is_not_waited_for_for_hours(monkeypatch):
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(_free_port())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "_LONGEST_START", timedelta(seconds=1))
    message = r"Not all of the 2 processes began within 1 seconds.*log-rank1"
    with pytest.raises(NightschoolError, match=message), world_module.joined_world():
        pass


def test_a_world_that_is_half_described_is_refused():
    with pytest.raises(UsageError, match="LOCAL_RANK"), world_module.joined_world({"WORLD_SIZE": "2", "RANK": "0"}):
        pass
