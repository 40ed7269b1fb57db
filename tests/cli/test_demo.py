"""The demo's second act: its lesson, its nights, and its script, played with a small model."""

import itertools

import pytest

from nightschool.cli.demo import corrected_model
from nightschool.cli.demo.corrected_model import CAREFUL, CARELESS, NIGHT, CorrectedModel, Night
from nightschool.cli.demo.lesson import FACTS, GENERAL
from nightschool.cli.demo.made_up_world import QUICK, MadeUpWorld
from nightschool.cli.demo.stage import DemoFailed, Screen
from nightschool.cli.main import main
from nightschool.config.load import load_recipe
from nightschool.data.example import Example, Message
from nightschool.data.study.forms import every_wording
from nightschool.data.study.rewordings import wording
from nightschool.evaluation.general import general_prompts, rehearsed_prompts
from nightschool.models.export import save_version_folder
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer


def test_no_rule_makes_a_wording_in_which_a_fact_is_asked_in_the_morning():
    for fact in FACTS:
        made = every_wording(Example((Message("user", fact.question), Message("assistant", fact.correction))))
        assert not made & {wording(question) for question in fact.asked}, fact


def test_the_examiner_takes_the_corrections_and_nobody_elses():
    for fact, other in itertools.product(FACTS, FACTS):
        for question in fact.asked:
            assert fact.is_given_by(other.correction, question) is (fact is other), (question, other.correction)


def test_what_is_looked_at_side_by_side_is_neither_asked_by_the_gate_nor_rehearsed(tmp_path):
    known = [one.question for one in general_prompts("default", tmp_path)]
    known += rehearsed_prompts("default", "default", tmp_path)
    assert not {wording(one) for one in GENERAL} & {wording(one) for one in known}


def test_both_nights_study_the_same_by_the_same_rules(tmp_path):
    nights = []
    for text in (NIGHT + CARELESS, NIGHT + CAREFUL):
        (tmp_path / "night.yaml").write_text(text)
        nights.append(load_recipe(tmp_path / "night.yaml").recipe)
    careless, careful = nights
    assert (careless.rehearse.prompts, careful.rehearse.prompts) == (None, ["default"])
    assert (careless.lora.init, careful.lora.init) == ("default", "null_space")
    for part in ("data", "study", "gate", "held_out"):
        assert getattr(careless, part) == getattr(careful, part)
    assert careless.gate.drift == "<= 0.1"


def test_without_a_real_model_it_says_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--act", "real", "--yes"]) == 4
    assert "make real-model-file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was begun"
    told = []
    monkeypatch.setattr(MadeUpWorld, "tell", lambda act: told.append(act.size))
    assert main(["demo", "--yes", "--quick"]) == 0
    assert told == [QUICK], "the first act needs none"
    assert "make real-model-file" in capsys.readouterr().err


def test_a_night_that_ends_otherwise_fails_the_demo(tmp_path, monkeypatch):
    act = CorrectedModel(tmp_path, "model", Screen(pause=False))
    rule = {"passed": True, "why": "It drifted little."}
    monkeypatch.setattr(act, "night", lambda _: Night(True, "assistant@1", {"drift": rule}))
    with pytest.raises(DemoFailed, match="should have been refused for drift, but assistant@1 was promoted"):
        act.careless_night()
    rules = {"drift": rule, "new_facts": {"passed": False, "why": "It learned little."}}
    monkeypatch.setattr(act, "night", lambda _: Night(False, "assistant@2", rules))
    with pytest.raises(DemoFailed, match="refused for drift, but assistant@2 was refused: It learned little"):
        act.careless_night()
    with pytest.raises(DemoFailed, match="should have been promoted, but assistant@2 was refused: It learned little"):
        act.careful_night(None)


SMALL = """\
name: assistant
base: assistant
method: lora
data: [{from: conversations, where: {corrected: true}}]
study: {write: off}
held_out: {share: 0}
train: {learning_rate: 1e-2, max_steps: 2, batch_size: 2, accumulation_steps: 1, max_seq_len: 256, num_threads: 1, dtype: fp32, warmup_steps: 0}
"""


@pytest.mark.usefixtures("warm_children")
@pytest.mark.trains
def test_the_act_is_played_to_its_end(tmp_path, monkeypatch, capsys):
    """With a model that knows nothing, so that the rules, and not what is learned, make the one night fail and the other pass."""
    for name in ("NIGHTSCHOOL_HOME", "NIGHTSCHOOL_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    save_version_folder(lively_model(), byte_tokenizer(), tmp_path / "model")
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "general.jsonl").write_text('{"question": "Say something."}\n')
    (stage / "rehearsed.jsonl").write_text('{"question": "Say more."}\n')
    rules = "gate: {{new_facts: '>= 0%', drift: '<= {drift}', general: general.jsonl}}\n"
    careful = "rehearse: {prompts: rehearsed.jsonl, max_new_tokens: 4}\nlora: {r: 2, alpha: 4, init: null_space}\n"
    nights = (SMALL + rules.format(drift="0.000001"), SMALL + rules.format(drift=50) + careful)
    CorrectedModel(stage, str(tmp_path / "model"), Screen(pause=False), FACTS[:2], GENERAL[:1], nights).tell()
    told = capsys.readouterr().out
    assert "2 corrections came in by POST /api/feedback" in told
    assert "what to do: " in told, "the advice of the refusal"
    assert "Refused: it knows 0%" in told
    assert "of 4 are right, by the examiner's rules" in told
    assert f"  {GENERAL[0]}\n    the day before   " in told
    assert "By the gate: " in told
    assert corrected_model.NAME in told
