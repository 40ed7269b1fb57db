"""A run ends where its held-out loss falls no more, publishes its best checkpoint, and may begin with another run's."""

import json

import pytest
import torch

from nightschool.config.load import parse_recipe
from nightschool.config.recipe import Recipe
from nightschool.errors import ModelError, NotFound, StateMismatch
from nightschool.events import read_events
from nightschool.models.adapters import attach_lora, describe_adapter
from nightschool.models.build import build_model
from nightschool.store import checkpoints
from nightschool.store.registry import Registry
from nightschool.training.planning.plan import plan_of
from nightschool.training.state import TrainState
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, differing
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.mark.parametrize(
    ("losses", "min_delta", "in_vain"),
    [
        ([], 0, 0),
        ([2.0], 0, 0),
        ([2.0, 1.0], 0, 0),
        ([2.0, 2.0], 0, 1),
        ([2.0, 1.0, 1.5, 1.2], 0, 2),
        ([2.0, 1.0, 1.5, 0.9], 0, 0),
        ([2.0, 1.95, 1.9, 1.85], 0.1, 3),
        ([2.0, 1.8, 1.75], 0.1, 1),
        ([2.0, float("nan"), 1.0], 0, 0),
    ],
)
def test_evaluations_in_vain_are_counted(losses, min_delta, in_vain):
    assert TrainState("x", heldout_history=losses).evaluations_in_vain(min_delta) == in_vain


PATIENT = {"evaluate_every": "1 steps", "early_stopping": {"patience": 3}}


def overfits(folder, **train):
    """Four rows that are learned by heart, and others that are held out."""
    rows = [{"query": f"{n}?", "retrieved": "abc def"[n:]} for n in range(4)]
    settings = {"steps_total": 40, "learning_rate": 5e-2, "lr_schedule": "constant"} | PATIENT | train
    return MiniRun(folder, rows=rows, recipe={"checkpoints": {"background": False, "every": "100 steps"}}, **settings)


def heldout(run):
    return {row["step"]: row["heldout_loss"] for row in read_events(run.run.events.path) if row["event"] == "heldout"}


def test_a_run_ends_early_and_publishes_its_best_checkpoint(tmp_path):
    run = overfits(tmp_path / "run").go()
    losses = heldout(run)
    last = max(losses)
    assert last < 40
    trained = {step: loss for step, loss in losses.items() if step > 0}
    best = min(trained, key=lambda step: (trained[step], step))
    assert best <= last - 3 or min(losses.values()) == losses[0]
    published = next(row for row in read_events(run.run.events.path) if row["event"] == "published")
    assert published["step"] == best < last
    version = Registry(run.home).resolve(run.run.status.candidate)
    assert version.facts.heldout_loss == trained[best]
    status = run.run.status
    assert (status.state, status.step, status.steps_total) == ("completed", last, last)
    assert any(row["event"] == "early_stop" for row in read_events(run.run.events.path))


def test_without_patience_all_steps_are_done(tmp_path):
    run = overfits(tmp_path / "run", early_stopping={"patience": None}, steps_total=12).go()
    assert run.state.step == 12
    assert not any(row["event"] == "early_stop" for row in read_events(run.run.events.path))


def test_what_is_no_gain_to_speak_of_ends_a_run_too(tmp_path):
    run = overfits(tmp_path / "run", early_stopping={"patience": 2, "min_delta": 100.0}).go()
    assert max(heldout(run)) == 2, "the loss before training is the first best, and the two after it are in vain"


def test_a_run_that_ends_early_resumes_bit_by_bit(tmp_path):
    straight = overfits(tmp_path / "straight").go()
    first = overfits(tmp_path / "parts").go(stop_after=2)
    second = overfits(tmp_path / "parts").go(resume=first.saved[-1])
    assert_equal_runs(straight, second)
    third = overfits(tmp_path / "parts")
    third.run.update_status(candidate=None)
    third.go(resume=second.saved[-1])
    assert third.saved == [], "it is at its end already"


def test_patience_needs_a_best_checkpoint_and_held_out_examples(tmp_path):
    plain = {"base": "x", "data": [{"path": "y"}], "checkpoints": {"keep": {"best": 0}}}
    with pytest.raises(ValueError, match=r"keep\.best: 1"):
        Recipe.model_validate(plain | {"train": {"early_stopping": {"patience": 1}}})
    run = MiniRun(tmp_path / "run", recipe={"held_out": {"share": 0}}, early_stopping={"patience": 1})
    notes = plan_of(run.prepared(), run.home).facts["notes"]
    assert any("needs a held-out loss" in note for note in notes)


# Other starting points.


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_new_run_begins_with_the_weights_of_a_checkpoint(tmp_path, lora):
    first = MiniRun(tmp_path / "first", lora=lora).go()
    wanted = first.saved[0]
    for number, said in enumerate((str(wanted), f"{first.run.id}/{wanted.name}", first.run.id)):
        other = MiniRun(tmp_path / f"other{number}", lora=lora, home=first.home, recipe={"from_checkpoint": said})
        task = other.prepared().task
        newest = checkpoints.ls(first.run)[-1].path if said == first.run.id else wanted
        from nightschool.training.checkpoint.checkpoint_reader import load_group

        assert differing(task.saved_tensors(), load_group(newest, "model")) == []
    fresh = MiniRun(tmp_path / "fresh", lora=lora).prepared().task
    assert differing(fresh.saved_tensors(), load_group(wanted, "model"))


def test_a_run_from_a_checkpoint_resumes_from_its_own(tmp_path):
    first = MiniRun(tmp_path / "first", lora=LORA).go()
    recipe = {"from_checkpoint": first.run.id}
    straight = MiniRun(tmp_path / "straight", lora=LORA, home=first.home, recipe=recipe).go()
    part = MiniRun(tmp_path / "parts", lora=LORA, home=first.home, recipe=recipe).go(stop_after=3)
    rest = MiniRun(tmp_path / "parts", lora=LORA, home=first.home, recipe=recipe).go(resume=part.saved[-1])
    assert_equal_runs(straight, rest)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    first = MiniRun(tmp_path / "first", lora=LORA).go()
    with pytest.raises(StateMismatch, match="does not fit this run"):
        MiniRun(tmp_path / "full", home=first.home, recipe={"from_checkpoint": first.run.id}).prepared()
    from nightschool.models.export import save_version_folder
    from tests.support.tokenizers_for_tests import byte_tokenizer
    from tests.support.training_setups import base_folder

    assert base_folder
    tokenizer = byte_tokenizer()
    save_version_folder(build_model("tiny-qwen3", len(tokenizer), seed=7), tokenizer, tmp_path / "another")
    with pytest.raises(StateMismatch, match="stands on other weights"):
        MiniRun(
            tmp_path / "elsewhere", lora=LORA, home=first.home, base=str(tmp_path / "another"),
            recipe={"from_checkpoint": first.run.id},
        ).prepared()  # fmt: skip
    with pytest.raises(NotFound):
        MiniRun(tmp_path / "none", home=first.home, recipe={"from_checkpoint": "no-such-run"}).prepared()


# What an adapter reaches, and how fast it learns.


def test_a_target_that_names_nothing_is_refused_with_the_nearest(tmp_path):
    model = build_model("tiny-qwen3", 64, seed=1)
    with pytest.raises(ModelError, match=r"has qproj, and no module .* Did you mean q_proj\?"):
        attach_lora(model, LORA.model_copy(update={"target_modules": ["v_proj", "qproj"]}), seed=0)


def test_the_plan_says_which_layers_the_adapter_reaches(tmp_path):
    run = MiniRun(tmp_path / "run", lora=LORA.model_copy(update={"target_modules": ["q_proj", "v_proj"]}))
    plan = plan_of(run.prepared(), run.home)
    count = plan.facts["adapter_layers"]["q_proj"]
    assert plan.facts["adapter_layers"] == {"q_proj": count, "v_proj": count}
    row = next(row for row in plan.rows if row.label == "adapter")
    assert row.text.startswith(f"rank 4 on {2 * count} layers: {count} q_proj, {count} v_proj; not down_proj, ")
    assert "lm_head" not in row.text
    whole = describe_adapter(attach_lora(build_model("tiny-qwen3", 64, seed=1), LORA, seed=0))
    assert whole.missed == ()


def test_targets_may_be_written_in_a_line():
    for text, expected in (
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("all-linear", "all-linear"),
    ):
        plain = {"base": "x", "data": [{"path": "y"}], "lora": {"target_modules": text}}
        assert Recipe.model_validate(plain).lora.target_modules == expected
    pattern = {"base": "x", "data": [{"path": "y"}], "lora": {"target_modules": r".*\.q_proj"}}
    assert Recipe.model_validate(pattern).lora.target_modules == r".*\.q_proj"


def test_an_adapter_learns_ten_times_as_fast_unless_the_recipe_says_otherwise():
    plain = "base: x\ndata: [{path: y}]\n"
    rates = {}
    for method in ("full", "lora", "qlora", "dpo"):
        loaded = parse_recipe(plain + f"method: {method}\n", env={})
        rates[method] = loaded.recipe.train.learning_rate
        assert str(loaded.origins["train.learning_rate"]) == f"default: method: {method}"
        again = Recipe.model_validate(loaded.recipe.as_plain())
        assert again.train.learning_rate == rates[method]
    assert rates == {"full": 2e-6, "lora": 2e-5, "qlora": 2e-5, "dpo": 2e-5}
    said = parse_recipe(plain + "method: lora\ntrain: {learning_rate: 2e-6}\n", env={})
    assert said.recipe.train.learning_rate == 2e-6
    assert said.origins["train.learning_rate"].kind == "recipe"
    assert json.dumps(said.recipe.as_plain())
    assert torch.tensor(rates["lora"] / rates["full"]).round().item() == 10
