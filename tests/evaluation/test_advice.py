"""A refusal names the one change that would most likely have passed, by the run's own curve."""

from dataclasses import replace

import pytest

from nightschool.config.recipe import Gate
from nightschool.evaluation.effort import Effort
from nightschool.evaluation.gate import decide
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.evaluation.verdict import GateReport
from tests.evaluation.test_gate import answers, sheet

RISING = ((20, 0.1, 0.02), (40, 0.2, 0.03), (60, 0.3, 0.05), (80, 0.4, 0.06))
FLAT = ((20, 0.3, 0.02), (40, 0.4, 0.03), (60, 0.4, 0.05), (80, 0.4, 0.06))
EARLY = ((20, 0.6, 0.05), (40, 1.0, 0.09), (60, 1.0, 0.3), (80, 1.0, 0.4))


def effort(curve, **more):
    facts = {"step": 80, "steps_total": 80, "epochs": 8, "learning_rate": 5e-4, "wordings": 6.0}
    return Effort(tuple(SpotCheck(*point) for point in curve), **(facts | more))


def refused(effort, *, learned=(8, 2), general=(10, 0), drift=0.06):
    champion = sheet("m@1", answers("new", 0, 10), answers("general", 10, 0))
    candidate = replace(sheet("m@2", answers("new", *learned), answers("general", *general)), drift=drift)
    report = decide(candidate, champion, Gate(drift="<= 0.1"), effort=effort)
    assert report.decision == "refuse"
    assert GateReport.from_json(report.to_json()) == report, "the report keeps the curve"
    (only,) = report.suggestions
    return only


@pytest.mark.parametrize(
    ("spent", "figures", "said"),
    [
        # What rises still needs 50 %: 0.4 + 0.1, at 0.2 in 40 steps, is 20 steps more of 80, and 8 epochs become 10.
        (effort(RISING), {"learned": (4, 6)}, "20% at step 40 and 40% at step 80: at that pace it is enough at about step 100. Write train.epochs: 10."),
        (effort(RISING, max_steps=80), {"learned": (4, 6)}, "Write train.max_steps: 100."),
        (effort(FLAT), {"learned": (4, 6)}, "40% at step 40 and 40% at step 80. Write train.learning_rate: 0.001."),
        (effort(RISING, wordings=1.0), {"learned": (4, 6)}, "was trained in one wording on the average"),
        (effort(()), {"learned": (4, 6)}, "Write train.epochs: 16, with train.early_stopping.every: 20 steps"),
        (effort((), studies=False, wordings=1.0), {"learned": (4, 6)}, "Write train.epochs: 16."),
        # Enough was known by step 40, within the drift.
        (effort(EARLY), {"drift": 0.4}, "At step 40 enough was known already (100% learned, drift 0.0900 nats a token); what came after it led away, to 100% learned, drift 0.4000 nats a token at step 80. Write train.max_steps: 40."),
        (effort(EARLY), {"general": (5, 5)}, "Write train.max_steps: 40."),
        (effort(()), {"drift": 0.4}, "Nothing was rehearsed. Write rehearse.prompts: default."),
        (effort((), rehearsed=0.5), {"drift": 0.4}, "0.5 answers were rehearsed beside an example. Write rehearse.ratio: 1."),
        (effort((), rehearsed=2.0), {"general": (5, 5)}, "The candidate lost what nobody taught. 2 answers were rehearsed beside an example already. Write method: lora"),
        (effort((), rehearsed=2.0, adapter=True), {"drift": 0.4}, "Write train.learning_rate: 0.00025."),
        (effort((), studies=False), {"drift": 0.4}, "Write train.learning_rate: 0.00025."),
        (effort(FLAT), {"learned": (4, 6), "drift": 0.4}, "so that neither more nor less of the same will do. Nothing was rehearsed"),
    ],
)  # fmt: skip
def test_one_change_follows_from_the_curve(spent, figures, said):
    assert said in refused(spent, **figures)


def test_old_answers_need_more_old_examples():
    champion = sheet("m@1", answers("old", 10, 0))
    report = decide(sheet("m@2", answers("old", 5, 5)), champion, Gate(), effort=effort((), replay_ratio=1.5))
    assert report.suggestions == ("Old answers were lost, with 1.5 old examples for a new one. Write replay.ratio: 3.",)
