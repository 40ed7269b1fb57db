"""A deleted conversation is trained out of what may know it: with the recipe of the tainted runs, from clean weights."""

import json
from pathlib import Path

import pytest

from nightschool.config.recipe import Recipe
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase
from nightschool.feedback.retraining import retrain
from nightschool.jobs.outcome import CycleRecord
from nightschool.jobs.starting_weights import starting_weights
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.tenants import Quota, Tenants
from tests.support.cli_home import MORNING, add_version

SOURCES = [{"path": "facts.json"}, {"from": "conversations", "since": "last_promoted"}]


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home").ensure()
    ConversationStore(home.database).record("req-1", "acme/bot", "v", [{"role": "user", "content": "secret"}], "ok")
    return home


def night(home, minutes, *, base, root="/data", learns=True, name="acme/bot", parent=None, **changes):
    """A run of a night that has studied the conversation or not, and the version that it made."""
    recipe = Recipe(**{"name": name, "base": base, "data": SOURCES} | changes)
    run = RunStore(home).create(recipe.as_plain(), name=name, moment=MORNING.replace(minute=minutes))
    CycleRecord("manual", root, "org/base", None, "", 1).write(run)
    messages = [{"role": "user", "content": "secret"}, {"role": "assistant", "content": "ok", "weight": 1}]
    row = {"id": "req-1", "source": "conversations", "messages": messages}
    (run.path / "new_examples.jsonl").write_text(json.dumps(row) + "\n" if learns else "")
    return add_version(home, name=name, run_id=run.id, parent=parent, base="org/base")


def forget_and_retrain(home):
    found, _ = erase(home, "req-1")
    return retrain(home, found, source="cli", created_by="somebody")


def test_each_tainted_name_is_trained_anew_from_where_its_first_tainted_version_began(home):
    clean = night(home, 0, base="org/base", learns=False)
    learned = night(home, 1, base=clean.ref, parent=clean.ref, train={"epochs": 1})
    more = {"data": [*SOURCES, {"path": "more.json"}], "train": {"epochs": 9}}
    night(home, 2, base=learned.ref, parent=learned.ref, learns=False, root="/other", **more)
    anew = forget_and_retrain(home)
    assert list(anew.jobs) == ["acme/bot"]
    assert anew.without == {}
    job = JobQueue(home.database).get(anew.jobs["acme/bot"])
    assert (job.state, job.full_name, job.root, job.source, job.created_by) == (
        "queued",
        "acme/bot",
        "/other",
        "cli",
        "somebody",
    )
    assert job.metadata == {"retrains_without": "req-1"}
    recipe = Recipe.model_validate(job.recipe)
    assert (recipe.base, recipe.train.epochs) == (clean.ref, 9)
    paths = [source.path for source in recipe.data if source.path]
    assert paths == ["/data/facts.json", "/other/facts.json", "/other/more.json"]
    assert [source.since for source in recipe.data if source.from_] == ["always"]
    assert starting_weights(home, recipe) == clean.ref


def test_a_line_that_was_tainted_from_its_first_night_begins_with_its_base_again(home):
    champion = night(home, 0, base="org/base")
    Registry(home).promote("acme/bot", champion.id, by="test")
    recipe = Recipe.model_validate(JobQueue(home.database).get(forget_and_retrain(home).jobs["acme/bot"]).recipe)
    assert starting_weights(home, recipe) == "org/base"
    assert starting_weights(home, recipe.model_copy(update={"start": "champion"})) == champion.ref


def test_what_stands_on_a_tainted_version_is_not_trained_on_it_again(home):
    below = night(home, 0, base="org/base")
    night(home, 1, name="acme/on-top", base=below.ref, learns=False, parent=below.ref)
    anew = forget_and_retrain(home)
    assert list(anew.jobs) == ["acme/bot"]
    assert "which is tainted itself. Train acme/bot anew" in anew.without["acme/on-top"]


def test_a_name_without_runs_or_room_says_so_and_the_conversation_is_gone(home):
    version = night(home, 0, base="org/base")
    night(home, 1, base="org/base", name="acme/other")
    RunStore(home).remove(version.facts.run_id)
    Tenants(home.database).add("acme", Quota(open_trainings=0), by="test")
    add_version(home, name="acme/bot", parent=night(home, 2, base="org/base").ref)
    anew = forget_and_retrain(home)
    assert anew.jobs == {}
    assert {name: "may have 0" in why for name, why in anew.without.items()} == {"acme/bot": True, "acme/other": True}
    assert JobQueue(home.database).ls() == []
    assert ConversationStore(home.database).select() == []


def test_nobody_knows_the_recipe_of_a_version_whose_run_is_gone(home):
    first = night(home, 0, base="org/base")
    add_version(home, name="acme/child", parent=first.ref)
    anew = forget_and_retrain(home)
    assert "are gone, and their recipes with them" in anew.without["acme/child"]
    assert Path(JobQueue(home.database).get(anew.jobs["acme/bot"]).root) == Path("/data")
