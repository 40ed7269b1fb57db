"""The gate decides by the rules, says why with both figures, and shows the answers behind them."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.config.recipe import Gate
from nightschool.evaluation.gate import decide
from nightschool.evaluation.scores import PairMargin, ProbeAnswer, ScoreSheet
from nightschool.evaluation.verdict import GateReport


def answers(kind, correct, wrong, start=0):
    made = []
    for number in range(start, start + correct + wrong):
        right = number - start < correct
        said = "yes" if right else "no"
        messages = [{"role": "user", "content": f"{kind} {number}?"}]
        made.append(
            ProbeAnswer(
                f"{kind}-{number}", kind, f"{kind} {number}?", "yes", messages, "trained", answer=said, correct=right
            )
        )
    return made


def sheet(name, *groups, loss=None, tokens=100):
    return ScoreSheet(
        name, loss, tokens if loss is not None else 0, tuple(answer for group in groups for answer in group)
    )


def judged(report):
    return {rule.rule: rule.passed for rule in report.rules}


def rule(report, name):
    return next(one for one in report.rules if one.rule == name)


def test_a_better_candidate_is_promoted_with_both_figures():
    champion = sheet("m@1", answers("new", 1, 9), answers("old", 98, 2), answers("pin", 2, 0), loss=1.2)
    candidate = sheet("m@2", answers("new", 9, 1), answers("old", 97, 3), answers("pin", 2, 0), loss=1.21)
    report = decide(candidate, champion, Gate())
    assert (report.decision, report.candidate, report.champion) == ("promote", "m@2", "m@1")
    assert judged(report) == {
        "holdout_loss": True,
        "new_facts": True,
        "forgetting": True,
        "general_lost": None,
        "pins": True,
    }
    loss, new, old = (rule(report, name) for name in ("holdout_loss", "new_facts", "forgetting"))
    assert (loss.candidate, loss.champion, loss.threshold) == (1.21, 1.2, pytest.approx(1.22))
    assert (new.candidate, new.champion, new.threshold) == (0.9, 0.1, 0.5)
    assert (old.candidate, old.champion, old.threshold) == (pytest.approx(1 / 98), None, 0.02)
    assert old.why == "1 of 98 old answers that the champion gives lost; needed: <= 2%."
    assert [pair.id for pair in report.lost] == ["old-97"]
    assert len(report.learned) == 8
    assert report.suggestions == ()


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ({"loss": 1.2201}, "holdout_loss"),
        ({"new": (4, 6)}, "new_facts"),
        ({"old": (95, 5)}, "forgetting"),
        ({"pin": (1, 1)}, "pins"),
    ],
)
def test_each_rule_alone_can_refuse(broken, failed):
    champion = sheet("m@1", answers("new", 0, 10), answers("old", 100, 0), answers("pin", 2, 0), loss=1.2)
    shape = {"new": (10, 0), "old": (100, 0), "pin": (2, 0), "loss": 1.2} | broken
    groups = [answers(kind, *shape[kind]) for kind in ("new", "old", "pin")]
    report = decide(sheet("m@2", *groups, loss=shape["loss"]), champion, Gate())
    assert report.decision == "refuse"
    assert [one.rule for one in report.failed] == [failed]
    assert len(report.suggestions) == 1
    if failed == "forgetting":
        assert "replay.ratio" in report.suggestions[0]
        assert len(rule(report, "forgetting").examples) == 5
        pair = rule(report, "forgetting").examples[0]
        assert (pair.question, pair.expected, pair.champion_answer, pair.candidate_answer) == (
            "old 95?",
            "yes",
            "yes",
            "no",
        )


def test_forgetting_counts_only_what_the_champion_knew():
    champion = sheet("m@1", answers("old", 50, 50))
    candidate = sheet("m@2", answers("old", 50, 50))
    assert rule(decide(candidate, champion, Gate()), "forgetting").candidate == 0
    half = sheet("m@2", answers("old", 25, 75))
    assert rule(decide(half, champion, Gate()), "forgetting").candidate == 0.5


def test_new_answers_do_not_make_up_for_lost_ones():
    champion = sheet("m@1", answers("old", 10, 10))
    swapped = [
        replace(answer, correct=not answer.correct, answer="no" if answer.correct else "yes")
        for answer in champion.answers
    ]
    report = decide(ScoreSheet("m@2", answers=tuple(swapped)), champion, Gate())
    assert rule(report, "forgetting").candidate == 1
    assert (len(report.learned), len(report.lost)) == (10, 10)


def test_the_first_version_is_promoted_though_nothing_can_be_compared():
    report = decide(sheet("m@1"), None, Gate())
    assert report.decision == "promote"
    assert set(judged(report).values()) == {None}
    assert report.notes == ("Nothing could be compared, so nothing speaks against m@1.",)
    assert [one.why for one in report.rules] == [
        "Nothing was held out.",
        "There was no new question to ask.",
        "There is no champion that could know more.",
        "There is no champion that could know more.",
        "No answer is pinned.",
    ]


def test_the_first_version_must_still_know_what_it_was_taught_and_what_is_pinned():
    assert decide(sheet("m@1", answers("new", 0, 10)), None, Gate()).decision == "refuse"
    assert decide(sheet("m@1", answers("pin", 1, 1)), None, Gate()).decision == "refuse"
    first = decide(sheet("m@1", answers("new", 10, 0), answers("old", 5, 0)), None, Gate())
    assert (first.decision, {pair.kind for pair in first.learned}) == ("promote", {"new"})


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("text", ["<= champion + 0.02", "<= 100", None])
@pytest.mark.parametrize("champion", [None, sheet("m@1", loss=1.0), sheet("m@1", loss=math.nan)])
def test_a_loss_that_is_not_finite_is_always_refused(loss, text, champion):
    report = decide(sheet("m@2", loss=loss), champion, Gate(holdout_loss=text))
    assert report.decision == "refuse"
    assert "The weights are broken" in report.suggestions[0]
    assert GateReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))).decision == "refuse"


def test_a_finite_loss_after_a_champion_without_one_passes():
    assert decide(sheet("m@2", loss=3.0), sheet("m@1", loss=math.nan), Gate()).decision == "promote"


@pytest.mark.parametrize(
    ("candidate", "champion", "why"),
    [
        (sheet("m@2", loss=1.0), None, "There is no champion to compare with."),
        (sheet("m@2", loss=1.0), sheet("m@1"), "The champion has no held-out loss."),
        (
            sheet("m@2", loss=1.0, tokens=99),
            sheet("m@1", loss=1.0),
            "The candidate's loss is over 99 tokens and the champion's over 100, so they cannot be compared.",
        ),
    ],
)
def test_a_loss_that_cannot_be_compared_is_not_judged(candidate, champion, why):
    result = rule(decide(candidate, champion, Gate()), "holdout_loss")
    assert (result.passed, result.why) == (None, why)
    assert rule(decide(candidate, champion, Gate(holdout_loss="<= 0.5")), "holdout_loss").passed is False


def test_old_questions_that_the_champion_cannot_answer_are_not_judged():
    report = decide(sheet("m@2", answers("old", 0, 5)), sheet("m@1", answers("old", 0, 5)), Gate())
    assert rule(report, "forgetting").why == "The champion answers none of the 5 old questions, so none could be lost."


def test_a_pin_that_the_champion_does_not_give_either_is_no_loss():
    champion = sheet("m@1", answers("pin", 1, 1))
    report = decide(sheet("m@2", answers("pin", 1, 1)), champion, Gate())
    assert report.decision == "promote"
    assert rule(report, "pins").why == "1 of 2 pinned answers the champion does not give either; none is lost."
    assert rule(report, "pins").examples[0].id == "pin-1"


def test_rules_that_are_off_are_not_applied():
    off = Gate(holdout_loss=None, forgetting=None, new_facts=None, general=None, pins="off")
    champion = sheet("m@1", answers("old", 9, 0), answers("pin", 1, 0), loss=1.0)
    report = decide(sheet("m@2", answers("old", 0, 9), answers("pin", 0, 1), loss=9.0), champion, off)
    assert (report.decision, report.rules) == ("promote", ())
    assert len(report.lost) == 10, "what was lost is shown all the same"


def test_a_rule_relative_to_the_champion_needs_the_same_questions():
    gate = Gate(new_facts=">= champion + 10%")
    candidate = sheet("m@2", answers("new", 6, 4))
    assert rule(decide(candidate, sheet("m@1", answers("new", 5, 5)), gate), "new_facts").passed is True
    assert rule(decide(candidate, sheet("m@1", answers("new", 6, 4)), gate), "new_facts").passed is False
    assert rule(decide(candidate, None, gate), "new_facts").passed is None
    fewer = decide(candidate, sheet("m@1", answers("new", 5, 0)), gate)
    assert rule(fewer, "new_facts").why == "The champion was asked 5 of the 10 new questions."


def test_questions_that_only_the_champion_was_asked_are_said():
    report = decide(sheet("m@2", answers("old", 3, 0)), sheet("m@1", answers("old", 5, 0)), Gate())
    assert report.notes == ("2 questions went only to the champion and decided nothing.",)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
    st.none() | st.floats(0.1, 5),
    st.booleans(),
)
def test_reports_and_sheets_survive_json_and_a_copy_of_the_champion_never_fails(new, old, loss, has_champion):
    groups = answers("new", *new), answers("old", *old), answers("pin", 1, 0)
    one = sheet("m@1", *groups, loss=loss)
    two = replace(one, version="m@2")
    report = decide(two, one if has_champion else None, Gate(new_facts=">= champion"))
    assert report.decision == "promote"
    assert GateReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    assert ScoreSheet.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one


def test_a_stored_report_may_carry_more_than_the_gate_knows():
    report = decide(sheet("m@1"), None, Gate())
    assert GateReport.from_json(report.to_json() | {"examined_at": "today"}) == report


def test_a_figure_that_is_no_number_is_text_in_json():
    row = ScoreSheet("m@1", math.inf, 1000).to_json()
    assert json.dumps(row, allow_nan=False) == (
        '{"version": "m@1", "heldout_loss": "inf", "heldout_tokens": 1000, "answers": [], "drift": null, '
        '"drift_tokens": 0, "open": [], "is_base": false, "margins": [], "rules": 0}'
    )
    assert ScoreSheet.from_json(row).heldout_loss == math.inf


@pytest.mark.parametrize(("lost", "decision"), [(1, "promote"), (2, "promote"), (3, "refuse")])
def test_general_answers_may_be_lost_up_to_the_tolerance(lost, decision):
    champion = sheet("m@1", answers("general", 10, 20))
    candidate = sheet("m@2", answers("general", 10 - lost, 20 + lost))
    report = decide(candidate, champion, Gate())
    assert report.decision == decision
    found = rule(report, "general_lost")
    assert (found.candidate, found.threshold, len(found.examples)) == (lost / 10, 0.2, lost)
    assert found.why == f"{lost} of 10 general answers that the champion gives lost; needed: <= 20%."
    assert len(report.lost) == lost
    assert decide(candidate, champion, Gate(general="off")).decision == "promote"
    assert decide(candidate, champion, Gate(general_lost="<= 5%")).decision == "refuse"


def test_a_champion_that_answers_hardly_any_general_question_has_none_to_lose():
    champion, candidate = sheet("m@1", answers("general", 4, 36)), sheet("m@2", answers("general", 0, 40))
    found = rule(decide(candidate, champion, Gate()), "general_lost")
    assert (found.passed, found.why) == (
        None,
        "The champion answers 4 of 40 general questions: too few to judge by.",
    )
    nothing = rule(decide(candidate, candidate, Gate()), "general_lost")
    assert nothing.why == "The champion answers none of the 40 general questions, so none could be lost."


def test_drift_is_told_and_judged_only_by_a_rule():
    champion = sheet("m@1", answers("old", 5, 0))
    candidate = replace(sheet("m@2", answers("old", 5, 0)), drift=0.75, drift_tokens=200)
    told = decide(candidate, champion, Gate())
    assert told.decision == "promote"
    assert [note for note in told.notes if "0.7500 nats a token over 200 tokens" in note]
    assert told.figures[0].drift == 0.75
    judged_too = decide(candidate, champion, Gate(drift="<= 0.5"))
    assert (judged_too.decision, [one.rule for one in judged_too.failed]) == ("refuse", ["drift"])
    assert decide(candidate, champion, Gate(drift="<= 0.8")).decision == "promote"
    assert decide(replace(candidate, drift=None), champion, Gate(drift="<= 0.5")).decision == "promote"
    broken = replace(candidate, drift=math.nan)
    report = decide(broken, champion, Gate(drift="<= 0.5"))
    assert report.decision == "refuse"
    again = GateReport.from_json(json.loads(json.dumps(report.to_json())))
    assert math.isnan(again.figures[0].drift)


def test_a_base_in_the_place_of_the_champion_is_called_so():
    base = replace(sheet("./base", answers("old", 5, 0)), is_base=True)
    report = decide(sheet("m@1", answers("old", 5, 0)), base, Gate(), ["Something else."])
    assert (report.champion, report.champion_is_base, report.notes[0]) == ("./base", True, "Something else.")
    assert GateReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    old = report.to_json()
    del old["champion_is_base"]
    for row in old["figures"]:
        for name in ("drift", "general_correct", "general_asked"):
            del row[name]
    assert not GateReport.from_json(old).champion_is_base, "a report from before"


def preferring(name, *margins):
    pairs = (PairMargin(str(number), f"{number}?", "yes", "no", margin) for number, margin in enumerate(margins))
    return ScoreSheet(name, margins=tuple(pairs))


def test_a_margin_that_is_no_number_has_not_grown_and_one_that_stayed_counts_half():
    wanted = Gate(preferences="> 50%")
    report = decide(preferring("m@2", 1.0, math.nan, 2.0, 3.0), preferring("m@1", 0.5, 0.0, 2.0, 9.0), wanted)
    found = rule(report, "preferences")
    assert (found.passed, found.candidate, [pair.id for pair in found.pairs]) == (False, 0.375, ["1", "3"])
    assert GateReport.from_json(json.loads(json.dumps(report.to_json()))).failed[0].pairs[1] == found.pairs[1]
    assert report.suggestions[0].startswith("The candidate prefers the better answers less clearly")
    both = rule(decide(preferring("m@2", 1.0), preferring("m@1", math.inf), wanted), "preferences")
    assert both.passed is True
    assert rule(decide(preferring("m@2", 1.0), None, wanted), "preferences").passed is None
    assert rule(decide(preferring("m@2", 1.0), ScoreSheet("m@1"), wanted), "preferences").passed is None
