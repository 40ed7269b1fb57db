"""A plan says what asking the model takes, before the run and between its steps, and rehearses what nobody said yet."""

import pytest

from nightschool.config.recipe import Recipe
from nightschool.training.planning.asking import Asking, asking_row, num_checks
from nightschool.training.planning.plan import make_plan, plan_of
from nightschool.units import Every
from tests.support.training_setups import LORA, deterministic_threads
from tests.training.test_rehearsal import PROMPTS, a_run

pytestmark = pytest.mark.trains


def test_asking_is_planned_by_a_piece_of_it_and_no_more_once_all_is_asked(tmp_path):
    lora = LORA.model_copy(update={"init": "null_space"})
    run = a_run(tmp_path / "run", lora=lora, early_stopping={"every": "2 steps", "learned": ">= 90%"}, epochs=3)
    with deterministic_threads():
        facts = make_plan(Recipe.model_validate(run.run.recipe()), run.home, tmp_path / "run").facts
        prepared = run.prepared()
        run.run.path.mkdir(exist_ok=True)
        prepared.begin(run.run.path)
        begun = plan_of(prepared, run.home).facts
    assert facts["prompts_rehearsed"] == len(PROMPTS)
    assert facts["tokens_rehearsed"] > facts["tokens_rehearsed_trained"] > 0
    assert facts["asking_seconds"] > 0 == begun["asking_seconds"]
    assert facts["spot_checks"] == begun["spot_checks"] == facts["steps_total"] // 2
    asked = facts["asking_seconds"] + facts["spot_checks"] * facts["spot_check_seconds"]
    steps = facts["expected_step_seconds"] * facts["steps_total"]
    assert facts["expected_seconds"] == pytest.approx(asked + steps)


def test_spot_checks_are_counted_unless_a_clock_decides():
    assert num_checks(Every(4, "steps"), 10, 5) == 3
    assert num_checks(Every(2, "epochs"), 20, 5) == 2
    assert num_checks(Every(600, "seconds"), 20, 5) is None
    row = asking_row(Asking((("3 general prompts", 61.2),), None, 2.0))
    assert row.text == "at most, by a measured piece of it: 3 general prompts 61s, each spot check 2 s"
