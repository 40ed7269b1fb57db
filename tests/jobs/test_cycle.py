"""One cycle: what is new, what is skipped, who becomes champion, and where it stops."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, DataError, DiskFull, Locked
from nightschool.events import read_events
from nightschool.feedback.promotion import promote, roll_back
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.skipping import PreviousCycle
from nightschool.feedback.training_data import load_sources
from nightschool.jobs import cycle as cycles
from nightschool.jobs.cycle import continue_cycle, cycle_lock_path, run_cycle
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.outcome import CycleRecord
from nightschool.jobs.starting_weights import starting_weights
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore
from nightschool.work.stop import Stop


class School:
    """A home whose training and gate processes are replaced by what they leave on disk."""

    def __init__(self, tmp_path):
        self.root = tmp_path
        self.home = Home(tmp_path / "home").ensure()
        self.registry = Registry(self.home)
        self.training_exit_code, self.exam_exit_code, self.decision = 0, 0, "promote"
        self.resumed, self.examined, self.news = [], [], []
        self.before_gate = lambda: None
        self.teach(3)

    def teach(self, count, first=0):
        rows = [{"query": f"question {k}?", "retrieved": f"answer {k}"} for k in range(first, first + count)]
        (self.root / "train.json").write_text(json.dumps(rows))

    def recipe(self, **values):
        return Recipe(**{"name": "bot", "base": "new:tiny", "data": [{"path": "train.json"}]} | values)

    def train(self, run, around, *, resume=None):
        self.resumed.append(resume)
        if self.training_exit_code:
            state = "interrupted" if self.training_exit_code == 75 else "failed"
            run.update_status(state=state, step=5, exit_code=self.training_exit_code, error="the loss became NaN")
            return self.training_exit_code
        recipe = Recipe.model_validate(run.recipe())
        known = self.pool.digests("bot")
        loaded = load_sources(recipe.data, root=self.root, home=self.home, name="bot")
        new = [one.to_json() for one in loaded.examples if one.digest not in known]
        (run.path / "new_examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
        facts = VersionMetadata(run_id=run.id, base=recipe.base, parent=recipe.base if "@" in recipe.base else None)
        version = self.registry.publish("bot", lambda folder: (folder / "weights").write_text("w") and None, facts)
        run.update_status(state="completed", candidate=version.ref, exit_code=0)
        return 0

    def examine(self, run, around, *, candidate, champion):
        self.examined.append((candidate, champion))
        self.before_gate()
        if self.exam_exit_code == 0:
            passed = self.decision == "promote"
            rules = [{"rule": "forgetting", "passed": passed, "why": "12% of the old answers were lost"}]
            self.registry.save_report("bot", candidate.partition("@")[2], {"decision": self.decision, "rules": rules})
        return self.exam_exit_code

    @property
    def pool(self):
        return AcceptedExamples(Database(self.home).connect())

    @property
    def champion(self):
        return self.registry.aliases("bot").get("champion")

    def cycle(self, trigger="manual", previous=None, **values):
        around = CycleContext(on_news=self.news.append)
        return run_cycle(
            self.home, self.recipe(**values), trigger=trigger, root=self.root, previous=previous, around=around
        )


@pytest.fixture
def school(tmp_path, monkeypatch):
    school = School(tmp_path)
    monkeypatch.setattr(cycles, "run_training", school.train)
    monkeypatch.setattr(cycles, "run_gate", school.examine)
    return school


def test_a_candidate_that_passes_becomes_champion_and_its_examples_are_accepted(school):
    result = school.cycle()
    assert (result.outcome, result.exit_code) == ("promoted", 0)
    assert result.candidate == result.champion == f"bot@{school.champion}"
    assert len(school.pool.digests("bot")) == 3
    assert school.examined == [(result.candidate, None)]


def test_the_next_cycle_starts_from_the_champion_and_is_compared_with_it(school):
    first = school.cycle()
    school.teach(2, first=10)
    second = school.cycle()
    assert RunStore(school.home).get(second.run_id).recipe()["base"] == first.candidate
    assert school.examined[1] == (second.candidate, first.candidate)
    assert len(school.pool.digests("bot")) == 5
    assert CycleRecord.read(RunStore(school.home).get(second.run_id)).num_new_examples == 2


def test_a_refused_candidate_stays_published_and_moves_nothing(school):
    first = school.cycle()
    school.teach(2, first=10)
    school.decision = "refuse"
    second = school.cycle()
    assert (second.outcome, second.exit_code) == ("refused", 3)
    assert "forgetting (12% of the old answers were lost)" in second.detail
    assert f"bot@{school.champion}" == first.candidate == second.champion
    assert school.registry.resolve(second.candidate)
    assert len(school.pool.digests("bot")) == 3


@pytest.mark.parametrize(
    ("promote_when", "decision", "outcome"),
    [("never", "promote", "published"), ("never", "refuse", "published"), ("always", "refuse", "promoted")],
)
def test_the_recipe_says_when_the_champion_moves(school, promote_when, decision, outcome):
    school.decision = decision
    result = school.cycle(serve={"promote": promote_when})
    assert (result.outcome, result.exit_code) == (outcome, 0)
    assert (school.champion is not None) == (outcome == "promoted")
    assert f"serve.promote is {promote_when}" in result.detail


def test_a_pinned_champion_is_not_moved_and_the_result_says_so(school):
    first = school.cycle()
    school.registry.pin("bot", school.champion)
    school.teach(2, first=10)
    second = school.cycle()
    assert second.outcome == "published"
    assert f"the champion is pinned to {first.candidate}" in second.detail
    assert f"bot@{school.champion}" == first.candidate


def test_a_champion_that_moves_during_the_exam_is_not_overwritten(school):
    school.cycle()
    school.teach(2, first=10)
    third = school.registry.publish("bot", lambda folder: (folder / "w").write_text("w") and None, VersionMetadata())
    school.before_gate = lambda: school.registry.promote("bot", third.id, by="somebody")
    result = school.cycle()
    assert result.outcome == "published"
    assert "the champion moved" in result.detail
    assert school.champion == third.id


def test_without_new_data_a_scheduled_cycle_is_skipped_and_says_so(school):
    school.cycle()
    result = school.cycle("due")
    assert (result.outcome, result.detail) == ("skipped", "no new data: 3 examples, all studied before")
    assert len(school.resumed) == 1


def test_with_too_little_new_data_a_scheduled_cycle_is_skipped_with_both_figures(school):
    result = school.cycle("due", schedule={"min_new_examples": 50})
    assert result.outcome == "skipped"
    assert "3 new of 3 examples, and schedule.min_new_examples is 50" in result.detail


def test_min_new_examples_0_always_runs_and_so_does_a_manual_cycle(school):
    school.cycle()
    assert school.cycle("due", schedule={"min_new_examples": 0}).outcome == "promoted"
    assert school.cycle("manual").outcome == "promoted"


def test_what_was_refused_is_not_tried_again_until_something_changed(school):
    school.decision = "refuse"
    first = school.cycle("start")
    previous = PreviousCycle(first.data_fingerprint, first.outcome)
    again = school.cycle("due", previous)
    assert again.outcome == "skipped"
    assert "nothing changed since the last cycle, which was refused" in again.detail
    assert school.cycle("due", previous, replay={"ratio": 5}).outcome == "refused"
    school.teach(4)
    assert school.cycle("due", previous).outcome == "refused"


def test_serving_and_timing_do_not_count_as_a_change(school):
    school.decision = "refuse"
    first = school.cycle("start")
    previous = PreviousCycle(first.data_fingerprint, first.outcome)
    assert school.cycle("due", previous, schedule={"every": "1h"}).outcome == "skipped"


def test_held_out_examples_are_not_new(school):
    school.teach(200)
    school.cycle(held_out={"share": 0.5, "min_examples": 10})
    facts = CycleRecord.read(RunStore(school.home).ls()[0])
    assert 60 < facts.num_new_examples < 140


def test_a_new_shape_is_that_of_the_first_night_and_of_no_later_one(school):
    school.cycle(shape={"hidden_size": 32})
    champion = Registry(school.home).champion("bot")
    school.teach(3)
    assert school.cycle(shape={"hidden_size": 32}).outcome == "promoted"
    run = RunStore(school.home).ls()[0]
    assert (run.recipe()["base"], Recipe.model_validate(run.recipe()).shape.given()) == (champion.ref, {})
    school.teach(3)
    school.cycle(shape={"hidden_size": 64})
    assert RunStore(school.home).ls()[0].recipe()["base"] == "new:tiny"
    assert any("grew from new:tiny with hidden_size=32: starting anew" in line for line in school.news)


def test_another_base_in_the_recipe_starts_anew_and_says_so(school):
    school.cycle()
    school.teach(3)
    result = school.cycle("due", base="new:llama")
    run = RunStore(school.home).get(result.run_id)
    assert run.recipe()["base"] == "new:llama"
    assert CycleRecord.read(run).num_new_examples == 3  # all of them: this base has learned none
    assert any("grew from new:tiny: starting anew" in line for line in school.news)


def be_adapter(school, run_recipe, *, r=16, alpha=32, base="base@20250101_000000"):
    """A champion that is an adapter, as a night with this recipe would have published it."""
    run = RunStore(school.home).create(run_recipe.as_plain(), name="bot")

    def fill(folder):
        (folder / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": alpha, "target_modules": ["q"]}))

    version = school.registry.publish(
        "bot", fill, VersionMetadata(kind="adapter", method="lora", run_id=run.id, base=base)
    )
    school.registry.promote("bot", version.id, by="test")
    return version


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, None),
        ({"dropout": 0.1}, None),
        ({"target_modules": ["v_proj", "q_proj"]}, None),
        ({"r": 8}, "lora.r is 8 and its adapter has 16"),
        ({"alpha": 64}, "lora.alpha is 64.0 and its adapter has 32"),
        ({"target_modules": "all-linear"}, "lora.target_modules is all-linear and its adapter has q_proj, v_proj"),
    ],
)
def test_another_shape_of_adapter_begins_on_the_base_of_the_champion_and_says_so(school, lora, said):
    began = {"target_modules": ["q_proj", "v_proj"]}
    champion = be_adapter(school, school.recipe(method="lora", lora=began))
    wanted = school.recipe(method="lora", lora=began | lora)
    base = starting_weights(school.home, wanted, say=school.news.append)
    if said is None:
        assert (base, school.news) == (champion.ref, [])
    else:
        assert base == "base@20250101_000000"
        assert school.news == [f"A new adapter begins on {base}, the base of {champion.ref}: {said}"]
    # All weights begin with the adapter merged, whatever its shape.
    assert starting_weights(school.home, school.recipe(method="full", lora=lora)) == champion.ref


def test_training_that_fails_leaves_the_champion_and_says_where_it_failed(school):
    first = school.cycle()
    school.teach(2, first=10)
    school.training_exit_code = 1
    result = school.cycle()
    assert (result.outcome, result.exit_code) == ("failed", 1)
    assert result.detail == "training failed: the loss became NaN"
    assert f"bot@{school.champion}" == first.candidate


def test_an_exam_that_fails_leaves_the_champion_and_keeps_the_candidate(school):
    school.exam_exit_code = -9
    result = school.cycle()
    assert result.outcome == "failed"
    assert "the gate failed: the process was killed by SIGKILL; the machine may have run out of memory" in result.detail
    assert result.candidate is not None
    assert school.champion is None


def test_an_exam_that_fails_says_why_in_its_own_words(school, monkeypatch):
    def broken(run, around, **_):
        around.on_line("the weights of bot@x were altered.")
        return 1

    monkeypatch.setattr(cycles, "run_gate", broken)
    assert "the gate failed: the weights of bot@x were altered." in school.cycle().detail


def test_data_that_cannot_be_read_creates_no_run(school):
    (school.root / "train.json").write_text('[{"query": 1,\n}]')
    with pytest.raises(DataError, match=r"train\.json"):
        school.cycle()
    assert RunStore(school.home).ls() == []


def test_interrupted_training_goes_on_where_it_was(school):
    school.training_exit_code = 75
    result = school.cycle()
    assert (result.outcome, result.exit_code) == ("interrupted", 75)
    assert "interrupted at step 5" in result.detail
    school.training_exit_code = 0
    again = continue_cycle(school.home, result.run_id)
    assert again.outcome == "promoted"
    assert again.run_id == result.run_id
    assert school.resumed == [None, "latest"]


def test_a_cycle_that_was_interrupted_before_the_exam_does_not_train_again(school):
    stop = Stop()

    def trains_and_gets_a_signal(run, around, **more):
        code = School.train(school, run, around, **more)
        stop.reason = "SIGTERM"
        return code

    cycles.run_training = trains_and_gets_a_signal
    result = run_cycle(school.home, school.recipe(), trigger="due", root=school.root, around=CycleContext(stop=stop))
    assert result.outcome == "interrupted"
    assert school.examined == []
    assert continue_cycle(school.home, result.run_id).outcome == "promoted"
    assert school.resumed == [None]


def test_two_cycles_of_one_name_exclude_each_other(school):
    with lock(cycle_lock_path(school.home, "bot"), "a cycle of bot"), pytest.raises(Locked, match="a cycle of bot"):
        school.cycle()


def test_a_run_that_an_earlier_cycle_left_training_blocks_the_next_one(school):
    run = RunStore(school.home).create(school.recipe().as_plain(), name="bot")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", run.id])
    try:
        run.update_status(state="running", pid=child.pid)
        with pytest.raises(Locked, match=f"{run.id} is still being trained by process {child.pid}"):
            school.cycle()
        run.update_status(pid=os.getpid(), pid_created_at=1.0)  # a pid that now belongs to another program
        assert school.cycle().outcome == "promoted"
    finally:
        child.kill()
        child.wait()


def test_a_rolled_back_version_takes_its_examples_out_of_the_pool_and_brings_them_back(school):
    school.cycle()
    school.teach(2, first=10)
    second = school.cycle()
    version = second.candidate.partition("@")[2]
    assert len(school.pool.digests("bot")) == 5
    roll_back(school.home, "bot", by="test")
    assert len(school.pool.digests("bot")) == 3
    promote(school.home, "bot", version, by="test")
    assert len(school.pool.digests("bot")) == 5


def test_a_refused_candidate_that_is_promoted_by_hand_brings_its_examples(school):
    school.decision = "refuse"
    result = school.cycle()
    assert len(school.pool.digests("bot")) == 0
    promote(school.home, "bot", result.candidate.partition("@")[2], by="test")
    assert len(school.pool.digests("bot")) == 3


def test_a_rollback_by_two_versions_takes_both_out_of_the_pool(school):
    for k in range(3):
        school.teach(1, first=10 * k)
        school.cycle()
    oldest = school.registry.versions("bot")[-1]
    promote(school.home, "bot", oldest.id, by="test")
    assert len(school.pool.digests("bot")) == 1


def test_a_deleted_ancestor_does_not_take_the_examples_before_it_out_of_the_pool(school):
    for k in range(4):
        school.teach(1, first=10 * k)
        school.cycle()
    newest, _, second, _ = school.registry.versions("bot")
    school.registry.remove("bot", second.id)
    promote(school.home, "bot", newest.id, by="test")
    assert len(school.pool.digests("bot")) == 4


def test_a_version_from_another_name_ends_the_line_before_it(school):
    school.cycle()
    run = RunStore(school.home).create(school.recipe().as_plain(), name="bot")
    (run.path / "new_examples.jsonl").write_text('{"text": "a"}\n')
    facts = VersionMetadata(run_id=run.id, parent="other@20250101_000000")
    version = school.registry.publish("bot", lambda folder: (folder / "w").write_text("w") and None, facts)
    promote(school.home, "bot", version.id, by="test")
    assert school.pool.shuffled("bot", 0) == [{"text": "a"}]


def test_an_ancestor_with_damaged_facts_keeps_nobody_from_being_promoted(school):
    first = school.cycle()
    school.teach(2, first=10)
    school.decision = "refuse"
    second = school.cycle()
    facts = school.registry.resolve(first.candidate).path / "nightschool.json"
    facts.chmod(0o644)
    facts.write_text("{")
    promote(school.home, "bot", second.candidate.partition("@")[2], by="test")
    assert len(school.pool.digests("bot")) == 5


def killed_at(name, monkeypatch):
    """Break off, once, as a process that is killed does, when this method of the pool is called."""
    whole = getattr(AcceptedExamples, name)

    def broken(self, *arguments):
        monkeypatch.setattr(AcceptedExamples, name, whole)
        raise KeyboardInterrupt

    monkeypatch.setattr(AcceptedExamples, name, broken)


@pytest.mark.parametrize("step", ["versions", "add", "restore_version", "drop_version"])
def test_a_cycle_that_is_killed_after_the_champion_moved_is_completed(school, monkeypatch, step):
    first = school.cycle()
    school.decision = "refuse"
    school.teach(1, first=50)
    refused = school.cycle()  # so that there is a version to drop
    school.decision = "promote"
    school.teach(2, first=10)
    school.before_gate = lambda: killed_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        school.cycle()
    school.before_gate = lambda: None
    run = RunStore(school.home).ls()[0]
    assert run.id not in (first.run_id, refused.run_id)
    result = continue_cycle(school.home, run.id)
    assert (result.outcome, result.candidate) == ("promoted", f"bot@{school.champion}")
    assert len(school.pool.digests("bot")) == 5
    assert len(school.examined) == 3, "nothing is examined twice"
    assert len([move for move in school.registry.history("bot") if move.alias == "champion"]) == 2
    assert school.cycle("due").outcome == "skipped", "nothing is left to study"


def test_a_disk_that_is_full_after_the_champion_moved_is_completed_when_there_is_room(school, monkeypatch):
    def full(*_):
        raise DiskFull("No room is left for the database. Free some.")

    with monkeypatch.context() as patched:
        patched.setattr(AcceptedExamples, "add", full)
        result = school.cycle()
    assert (result.outcome, result.detail) == (
        "failed",
        "promotion failed: No room is left for the database. Free some.",
    )
    assert len(school.pool.digests("bot")) == 0
    again = continue_cycle(school.home, result.run_id)
    assert (again.outcome, again.exit_code, len(school.pool.digests("bot"))) == ("promoted", 0, 3)
    assert again.report["decision"] == "promote"


def test_where_nobody_continues_the_next_cycle_lets_the_pool_follow(school, monkeypatch):
    killed_at("add", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        school.cycle()
    result = school.cycle("due")
    assert (result.outcome, result.detail) == ("skipped", "no new data: 3 examples, all studied before")


def test_the_champion_itself_cannot_be_a_candidate(school):
    result = school.cycle()
    with_candidate = continue_cycle(school.home, result.run_id)
    assert with_candidate.outcome == "failed"
    assert "is the champion already" in with_candidate.detail


def test_the_outcome_is_kept_with_the_run(school):
    run = RunStore(school.home).get(school.cycle().run_id)
    assert [(row["event"], row["outcome"]) for row in read_events(run.events_path)][-1] == ("cycle", "promoted")


def test_the_result_is_json(school):
    assert json.loads(json.dumps(school.cycle().to_json()))["outcome"] == "promoted"


def test_promotion_of_a_pinned_name_is_refused(school):
    school.decision = "refuse"
    school.cycle(serve={"promote": "always"})
    school.registry.pin("bot", school.champion)
    school.teach(1, first=50)
    other = school.cycle()
    with pytest.raises(Conflict, match="pinned"):
        promote(school.home, "bot", other.candidate.partition("@")[2], by="test")


def test_failed_rules_reads_what_the_gate_writes():
    report = SimpleNamespace(rules=[{"rule": "pins", "passed": False, "why": "1 of 4 lost"}])
    assert cycles.failed_rules({"rules": report.rules}) == ["pins (1 of 4 lost)"]
