"""A run looks now and then at what it has learned and how far it drifted; it ends when that is enough, and publishes the best point."""

import json

import pytest

from nightschool.config.recipe import Recipe
from nightschool.config.rules import parse_rule
from nightschool.data.example import Message
from nightschool.errors import NonFiniteLoss, PromptTooLong
from nightschool.evaluation.drift import champion_answers, drift, drift_by_prompt, open_answers
from nightschool.evaluation.run_effort import effort_of
from nightschool.evaluation.spot_check import Limits, SpotCheck, best_of, checks_in_vain
from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.registry import Registry
from nightschool.training import spot_check
from nightschool.training.distributed.world import World
from nightschool.training.planning.plan import plan_of
from nightschool.training.spot_check import ModelInTraining, SpotChecks
from nightschool.training.state import TrainState
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, differing
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains
FACTS = [{"query": f"{n}?", "retrieved": f"it is {word}"} for n, word in enumerate(["red", "blue", "tall", "cold"])]
OPEN = ["hello there", "abc?", "what is it"]


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def a_run(folder, *, lora=LORA, gate=None, keep=9, stopping=None, **train):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "general.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in OPEN))
    settings = {
        "lr_schedule": "constant",
        "early_stopping": {"every": "2 steps", "learned": ">= 90%"} | (stopping or {}),
    }
    recipe = {
        "gate": {"general": "general.jsonl", "holdout_loss": None} | (gate or {}),
        "checkpoints": {
            "background": False,
            "every": "100 steps",
            "keep": {"last": 1, "best": 1} if keep == 1 else {"last": 9},
        },
    }
    return MiniRun(folder, rows=FACTS, lora=lora, recipe=recipe, **(settings | {"epochs": 9} | train))


def events(run, kind):
    return [row for row in read_events(run.run.events.path) if row["event"] == kind]


def found(monkeypatch, curve):
    """Have spot checks find these figures, by step."""
    monkeypatch.setattr(SpotChecks, "__call__", lambda _, step: SpotCheck(step, *curve[step]))


def test_the_best_point_knows_most_of_those_that_pass():
    recipe = {"base": "x", "data": [{"path": "y"}], "gate": {"drift": "<= 0.1 nats"}}
    limits = Limits.to_pass(Recipe.model_validate(recipe))
    assert limits.text == "learned >= 50% and drift <= 0.1 nats a token"
    checks = [SpotCheck(1, 0.4, 0.01), SpotCheck(2, 0.8, 0.05), SpotCheck(3, 0.9, 0.09), SpotCheck(4, 0.9, 0.08)]
    assert best_of([*checks, SpotCheck(5, 1.0, 0.2)], limits) == checks[3]
    assert best_of([*checks, SpotCheck(5, 0.9, 0.08)], limits) == checks[3], "of equals the earliest"
    assert best_of(checks[:1], limits) is None
    assert best_of([SpotCheck(1, 1.0, float("nan"))], limits) is None
    assert best_of([SpotCheck(1, 0.5)], limits).step == 1, "a drift that was not measured stands in nobody's way"
    assert SpotCheck.from_json(json.loads(json.dumps(SpotCheck(1, 0.5, float("inf")).to_json()))).drift == float("inf")


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"train": {"early_stopping": {"learned": ">= 90%"}}}, "write `every` with them"),
        ({"train": {"early_stopping": {"every": "5 steps", "learned": "<= 90%"}}}, "asks for a worse model"),
        ({"train": {"early_stopping": {"every": "5 steps", "learned": ">= 0.9 nats"}}}, "is a share, and not in nats"),
        ({"train": {"early_stopping": {"every": "5 steps", "learned": ">= champion"}}}, "no spot check asks"),
        ({"train": {"early_stopping": {"every": "5 steps"}, "zero_stage": 2}}, "zero_stage: 0"),
        ({"train": {"early_stopping": {"every": "5 steps"}}, "method": "dpo"}, "belongs to `method: full`"),
        ({"train": {"early_stopping": {"every": "5 steps"}}, "from_checkpoint": "r"}, "begins elsewhere"),
        ({"train": {"early_stopping": {"every": "5 steps"}}, "checkpoints": {"keep": {"best": 0}}}, r"keep\.best: 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_refused(plain, said):
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({"base": "x", "data": [{"path": "y"}]} | plain)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with deterministic_threads():
        return a_run(tmp_path_factory.mktemp("straight") / "run").go()


def test_looking_changes_nothing_and_a_resumed_run_looks_as_an_uninterrupted_one(tmp_path, straight):
    parts = a_run(tmp_path / "parts").go(stop_after=3)
    parts.go(resume=parts.saved[-1])
    assert_equal_runs(straight, parts)
    assert parts.state.spot_checks == straight.state.spot_checks
    assert [check.step for check in straight.state.spot_checks] == [2, 4, 6, 8, 10]
    blind = MiniRun(
        tmp_path / "blind", rows=FACTS, lora=LORA, recipe={"checkpoints": {"background": False}}, lr_schedule="constant", epochs=9,
    ).go()  # fmt: skip
    assert differing(blind.weights, straight.weights) == []


def test_a_check_is_an_event_and_in_the_row_of_its_step(straight):
    rows = {row["step"]: row for row in read_events(straight.run.metrics_path)}
    for check, event in zip(straight.state.spot_checks, events(straight, "spot_check"), strict=True):
        assert (event["step"], event["learned"], event["drift"]) == (check.step, check.learned, check.drift)
        assert (rows[check.step]["learned"], rows[check.step]["drift"]) == (check.learned, check.drift)
        assert check.drift > 0
    assert "learned" not in rows[3]
    spent = effort_of(straight.run)
    assert spent.checks == tuple(straight.state.spot_checks)
    assert (spent.steps_total, spent.wordings, spent.rehearsed, spent.passing) == (10, 1.0, 0.0, "learned >= 50%")
    assert spent.step == events(straight, "published")[0]["step"]


def test_the_drift_is_the_one_of_the_gate_and_several_processes_find_what_one_finds(straight, monkeypatch):
    prepared = straight.prepared()
    asked, dtype = prepared.data.checked, prepared.task.compute_dtype
    model = ModelInTraining(prepared.loaded)
    before = champion_answers(model, OPEN)
    alone = SpotChecks(asked, prepared.loaded, dtype, World())
    parts = [SpotChecks(asked, prepared.loaded, dtype, World(rank, 2)) for rank in range(2)]
    checked = checkpoints.ls(straight.run)[-1]
    from nightschool.training.checkpoint.full_state import load_weights

    load_weights(checked.path, prepared.task)
    whole = alone(10)
    assert whole == straight.state.spot_checks[-1]
    assert whole.drift == pytest.approx(drift(model, before)[0], rel=1e-6)
    drifts = drift_by_prompt(model, before)
    pairs = open_answers(model, before, drifts)
    assert [pair.drift for pair in pairs] == sorted(drifts, reverse=True)
    assert {pair.prompt for pair in pairs} == set(OPEN)
    assert [pair.drift for pair in open_answers(model, before, [0.1, float("nan"), 0.2])][1:] == [0.2, 0.1]
    told = []
    monkeypatch.setattr(World, "float_sums", lambda _, *numbers: told.append(numbers) or numbers)
    for part in parts:
        part(10)
    right, count, total, tokens = (sum(column) for column in zip(*told, strict=True))
    assert (right / count, total / tokens) == (whole.learned, pytest.approx(whole.drift, rel=1e-5))
    assert prepared.task.model.training is False or all(m.training for m in prepared.task.model.modules())


def test_questions_wait_and_are_answered_together(straight):
    loaded = straight.prepared().loaded
    together, alone = ModelInTraining(loaded), ModelInTraining(loaded)
    pending = [together.ask_greedily("", [Message("user", text)], 5) for text in (*OPEN, "a" * 30)]
    for text, one in zip((*OPEN, "a" * 30), pending, strict=True):
        ids = alone.ask_greedily("", [Message("user", text)], 5).result().token_ids
        assert one.result().token_ids == ids
        assert len(ids) <= 5
    with pytest.raises(PromptTooLong):
        together.ask_greedily("", [Message("user", "a" * loaded.context_tokens)], 5)


@pytest.mark.parametrize(
    ("curve", "in_vain"),
    [
        ([(0.0, 0.4), (0.5, 0.3), (0.9, 0.2)], 0),  # comes closer to the limit
        ([(0.0, 0.4), (0.9, 0.4), (0.9, 0.5)], 2),  # moves away from it, whatever it learns
        ([(0.9, 0.2), (0.5, 0.1), (0.6, 0.09)], 0),  # within it, what is known counts
        ([(0.5, 0.1), (0.9, 0.05), (0.9, 0.01), (0.8, 0.0)], 2),
        ([(0.5, 0.1), (0.9, 0.2), (0.6, None)], 0),
        ([], 0),
    ],
)
def test_spot_checks_in_vain_are_counted(curve, in_vain):
    limits = Limits(drift=parse_rule("drift", "<= 0.1"))
    assert checks_in_vain([SpotCheck(step, *point) for step, point in enumerate(curve)], limits) == in_vain


def test_patience_counts_spot_checks_where_there_are_any(tmp_path, monkeypatch):
    found(monkeypatch, {2: (0.5, 0.05), 4: (0.75, 0.05), 6: (0.75, 0.04), 8: (0.5, 0.03), 10: (1.0, 0.01)})
    run = a_run(tmp_path / "run", gate={"drift": "<= 0.1"}, stopping={"patience": 2}).go()
    assert events(run, "early_stop")[0]["why"] == "spot checks find nothing better"
    assert run.run.status.step == 8
    assert events(run, "published")[0]["step"] == 6, "of equals the one that drifted least"


def test_a_run_ends_when_it_knows_enough(tmp_path, monkeypatch):
    found(monkeypatch, {2: (0.5, 0.05), 4: (1.0, 0.3), 6: (0.95, 0.09)})
    run = a_run(tmp_path / "run", gate={"drift": "<= 0.1 nats"}).go()
    status = run.run.status
    assert (status.state, status.step, status.steps_total) == ("completed", 6, 6)
    (ended,) = events(run, "early_stop")
    assert ended["why"] == "it shows enough, 95% learned, drift 0.0900 nats a token"
    assert events(run, "published")[0]["step"] == 6
    assert run.state.heldout_steps[-1] == 6, "the held-out loss is taken at the end, too"


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_best_point_that_passes_is_published(tmp_path, monkeypatch, lora):
    curve = {2: (0.5, 0.05), 4: (0.75, 0.08), 6: (0.75, 0.06), 8: (0.75, 0.2), 10: (0.8, 0.4)}
    found(monkeypatch, curve)
    run = a_run(tmp_path / "run", gate={"drift": "<= 0.1"}, lora=lora, keep=1).go()
    points = {point.step: point for point in checkpoints.ls(run.run)}
    assert points[6].merit() == (0.75, -0.06)
    lowest = min(point.heldout_loss() for point in points.values())
    assert all(step in (6, 10) or point.heldout_loss() == lowest for step, point in points.items()), "no more is kept"
    version = Registry(run.home).resolve(run.run.status.candidate)
    assert events(run, "published")[0]["step"] == 6
    assert version.facts.heldout_loss == points[6].heldout_loss()


def test_a_best_point_whose_checkpoint_is_gone_is_said(tmp_path, monkeypatch, capsys):
    found(monkeypatch, {2: (0.8, 0.05), 4: (0.5, 0.05), 6: (0.5, 0.05), 8: (0.5, 0.05), 10: (0.5, 0.05)})
    monkeypatch.setattr(checkpoints, "by_age", lambda _: [])
    run = a_run(tmp_path / "run").go()
    assert (
        "Step 2 was the best (80% learned, drift 0.0500 nats a token), and its checkpoint is gone"
        in capsys.readouterr().out
    )
    assert events(run, "published")[0]["step"] == 10


def test_where_none_passes_the_run_says_so(tmp_path, monkeypatch, capsys):
    found(monkeypatch, {2: (0.25, 0.05), 4: (0.5, 0.2), 6: (0.75, 0.3), 8: (0.75, 0.2), 10: (0.5, 0.4)})
    run = a_run(tmp_path / "run", gate={"drift": "<= 0.1"}).go()
    said = capsys.readouterr().out
    assert "No spot check passed (needed: learned >= 50% and drift <= 0.1 nats a token)" in said
    assert "Most was learned at step 8: 75% learned, drift 0.2000 nats a token" in said
    assert run.run.status.state == "completed"


def test_broken_weights_end_the_run(tmp_path, monkeypatch):
    found(monkeypatch, {2: (0.5, 0.05), 4: (0.0, float("nan"))})
    with pytest.raises(NonFiniteLoss, match=r"drift is nan after step 4.*last good checkpoint is the one of step 2"):
        a_run(tmp_path / "run").go()


def test_the_plan_says_what_is_checked(tmp_path):
    run = a_run(tmp_path / "run", stopping={"drift": "<= 0.2"})
    plan = plan_of(run.prepared(), run.home)
    row = next(row for row in plan.rows if row.label == "spot checks")
    assert row.text == (
        "4 questions and 3 open prompts every 2 steps; the run ends at learned >= 90% and drift <= 0.2 nats a token"
    )
    texts = a_run(tmp_path / "texts")
    (tmp_path / "texts" / "data.json").write_text(json.dumps([{"text": "nothing to ask"}] * 3))
    assert any("nothing is spot-checked" in note for note in plan_of(texts.prepared(), texts.home).facts["notes"])


def test_a_state_of_before_there_were_spot_checks_is_read():
    plain = TrainState("x", step=3).to_json()
    old = {key: value for key, value in plain.items() if not key.startswith(("check", "learned", "drift"))}
    assert len(plain) - len(old) == 4
    assert TrainState.from_json(old) == TrainState("x", step=3)
    assert spot_check.MOST_QUESTIONS >= 16
