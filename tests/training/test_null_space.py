"""Adapters in the null space: what they add is small for what is rehearsed, and only second factors learn."""

import pytest
from safetensors.torch import load_file

from nightschool.config.recipe import Recipe
from nightschool.errors import Damaged
from nightschool.training import null_space
from tests.support.training_setups import LORA, deterministic_threads
from tests.training.test_rehearsal import a_run
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains
NULL_SPACE = LORA.model_copy(update={"init": "null_space"})


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def test_what_is_rehearsed_hardly_reaches_the_directions(tmp_path):
    prepared = a_run(tmp_path / "run", lora=NULL_SPACE).prepared()
    run = tmp_path / "folder"
    run.mkdir()
    model, task = prepared.task.model, prepared.task
    before = {name: factor.clone() for name, factor in null_space.first_factors(model).items()}
    documents = []
    prepared.begin(run)
    documents = task.rehearsal.documents
    factors = null_space.first_factors(model)
    grams = null_space._grams(model, task.path, documents, factors)
    for name, factor in factors.items():
        assert not factor.requires_grad  # not even after the adapter was left out, to ask
        old, new = ((f @ grams[name] @ f.T).trace() / f.square().sum() for f in (before[name], factor))
        assert new < 0.25 * old, name
    assert set(load_file(run / null_space.FILE)) == set(factors)
    assert {name.rpartition(".lora_")[2][0] for name in task._trainable} == {"B"}


def test_a_resumed_run_equals_an_uninterrupted_one_and_directions_are_drawn_once(tmp_path, monkeypatch):
    lora = NULL_SPACE
    whole = a_run(tmp_path / "whole", lora=lora).go()
    parts = a_run(tmp_path / "parts", lora=lora).go(stop_after=4)
    monkeypatch.setattr(null_space, "draw", lambda *_: pytest.fail("was drawn again"))
    parts.go(resume=parts.saved[-1])
    assert_equal_runs(whole, parts)


def test_a_broken_file_is_named(tmp_path):
    run = a_run(tmp_path / "run", lora=NULL_SPACE).go(stop_after=1)
    path = run.run.path / null_space.FILE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(Damaged, match="null_space"):
        run.go(resume=run.saved[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "rehearse.prompts: default"),
        ({"rehearse": {"prompts": "default"}, "method": "full"}, "belongs to `method: lora`"),
        ({"rehearse": {"prompts": "default"}, "from_checkpoint": "run"}, "from_checkpoint"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    plain = {
        "name": "bot",
        "base": "a/b",
        "method": "lora",
        "data": [{"path": "a.json"}],
        "lora": {"init": "null_space"},
    }
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(plain | changes)
