"""The general prompts: those of nightschool can be judged, and a recipe's own are read as they stand."""

import json

import pytest

from nightschool.data.example import Example, Message
from nightschool.data.match import is_correct
from nightschool.errors import DataError, NotFound
from nightschool.evaluation.eval_set import Limits, eval_set_of_general
from nightschool.evaluation.general import GeneralPrompt, general_prompts
from nightschool.evaluation.questions import make_questions

OWN = general_prompts("default", None)


def test_our_own_are_about_forty_short_questions_and_some_open_ones():
    closed = [one for one in OWN if one.answer]
    assert 35 <= len(closed) <= 45
    assert 5 <= len(OWN) - len(closed) <= 10
    assert len({one.question for one in OWN}) == len(OWN)
    assert max(len(one.question) for one in OWN) < 80
    assert len(eval_set_of_general(OWN, Limits()).questions) == len(closed)


@pytest.mark.parametrize("one", [one for one in OWN if one.answer], ids=lambda one: one.answer)
def test_a_right_answer_is_judged_right_and_a_wrong_one_wrong(one):
    for said in (one.answer, f"{one.answer}.", f"The answer is {one.answer}."):
        assert is_correct(said, one.answer), said
    others = {other.answer for other in OWN if other.answer} - {one.answer}
    assert not [other for other in others if is_correct(other, one.answer)]
    assert not is_correct("", one.answer)


def test_a_recipe_names_its_own_and_off_is_none(tmp_path):
    rows = [{"question": "Sky?", "answer": "blue"}, {"question": "Talk."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert general_prompts("mine.jsonl", tmp_path) == [GeneralPrompt("Sky?", "blue"), GeneralPrompt("Talk.")]
    assert general_prompts(None, tmp_path) == []
    with pytest.raises(NotFound, match=r"gate\.general"):
        general_prompts("gone.jsonl", tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"query": "Sky?", "retrieved": "blue"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:1: a general prompt is .* this row has query, retrieved"):
        general_prompts("mine.jsonl", tmp_path)


def test_what_is_taught_or_accepted_otherwise_is_not_asked_as_general():
    taught = Example((Message("user", "what color is the sky?"), Message("assistant", "green")))
    old = Example((Message("user", "Ice?"), Message("assistant", "cold")))
    general = [("What color is the sky?", "blue"), ("Ice?", "frozen"), ("Sun?", "hot")]
    questions = make_questions([taught], [old], [], 10, 0, general=general)
    assert [one.question for one in questions if one.kind == "general"] == ["Sun?"]
