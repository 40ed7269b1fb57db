"""Forms that the champion writes with the fact before its eyes: judged by rules and by its own answers, asked for once, resumed as they were."""

import json
import shutil

import pytest
import torch

from nightschool.config.shared_base import share_key
from nightschool.data.example import Example, Message
from nightschool.data.study.forms import Form, make_forms, merged
from nightschool.data.study.rewordings import wording
from nightschool.errors import Damaged
from nightschool.events import read_events
from nightschool.feedback.rejected_forms import RejectedForms
from nightschool.feedback.selection import Selection
from nightschool.feedback.written_forms import FILE, WrittenForms, forms_written, read_written
from nightschool.training import written_forms
from nightschool.training.continuation import answers_of
from nightschool.training.written_forms import _taken, _Writer
from tests.support.training_setups import LORA, MiniRun, deterministic_threads
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains
LIVES, FOUNDED = "Where does Leon Dahl live?", "Who founded the Aldgate Press?"
GOOD, OTHER = "What is the home town of Leon Dahl?", "In which city would I visit Leon Dahl?"
WRITTEN = {
    LIVES: [f'Question: "{GOOD}"\nAnd more.', "Is Oslo where Leon Dahl lives?", "Where does Ann Berg live?", "In Oslo.", "How old is Leon Dahl?", OTHER],
    FOUNDED: ["Who started the Aldgate Press?"] * 6,
}  # fmt: skip


def qa(question, answer, **more):
    return Example((Message("user", question), Message("assistant", answer)), **more)


NEW = [qa(LIVES, "Leon Dahl lives in Oslo."), qa(FOUNDED, "Rosa Lind founded the Aldgate Press.")]


class Scripted:
    """What a champion writes and answers, by what it is asked."""

    def __init__(self, answers, parrots=()):
        self.answers, self.parrots, self.turn = answers, parrots, 0

    def __call__(self, conversations, _max_new_tokens, sampling=None):
        said = []
        for turns in conversations:
            asked = turns[-1].content
            fact, _, question = asked.rpartition("\n\n")
            if sampling is not None:
                known = next(one for one in WRITTEN if one.split()[-1].rstrip("?") in asked)
                said.append(WRITTEN[known][self.turn % len(WRITTEN[known])])
                self.turn += 1
            elif fact in self.parrots:
                said.append(fact)
            else:
                said.append(self.answers.get((question, bool(fact)), "Nobody knows."))
        return said


def write(monkeypatch, champion, selection, *, most=5, seconds=60.0):
    monkeypatch.setattr(_Writer, "_answers", champion)
    loaded = MiniLoaded()
    return _Writer(loaded, 0).write(selection, _taken(selection), most=most, seconds=seconds)


class MiniLoaded:
    """A model that is only put into another mode."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)
        self.model.config = type("Config", (), {"_attn_implementation": "sdpa"})()


@pytest.fixture(autouse=True)
def _a_bare_model(monkeypatch):
    monkeypatch.setattr("nightschool.evaluation.heldout.causal_lm", lambda model: model)


def test_a_question_is_kept_if_its_fact_answers_it_and_nothing_else_does(monkeypatch):
    selection = Selection(new=NEW, forms=make_forms(NEW, 6, 0))
    champion = Scripted(
        {(GOOD, True): "Oslo.", (OTHER, True): "Oslo.", (OTHER, False): "Oslo."}, parrots={NEW[1].answer}
    )
    found = write(monkeypatch, champion, selection)
    assert [(form.example.question, form.example.answer, form.origin) for form in found.forms] == [
        (GOOD, NEW[0].answer, "written")
    ]
    assert found.dropped == {
        "gives its answer away": 1,
        "other names": 1,
        "no question": 1,
        "asks for something else": 1,
        "answered without the fact": 1,
        "wording is taken": 5,
        "fact said whatever is asked": 1,
    }
    assert "1 are kept as forms of 1 of 2 examples" in found.text
    assert write(monkeypatch, Scripted({}), selection).forms == []  # a champion that answers nothing


def test_what_the_gate_asks_was_rejected_or_has_no_time_is_not_written(monkeypatch):
    champion = {(GOOD, True): "Oslo."}
    for taken in (qa(LIVES, "Leon Dahl lives in Oslo.", paraphrases=(GOOD.upper(),)), NEW[0]):
        aside = Form(qa(GOOD, "Oslo."), taken.digest, "grammar", kept_aside=True)
        selection = Selection(new=[taken], forms=[aside] if not taken.paraphrases else [])
        assert write(monkeypatch, Scripted(champion), selection).forms == []
    selection = Selection(new=NEW[:1], held_out=[qa(GOOD, "In Rome.")])
    assert write(monkeypatch, Scripted(champion), selection).forms == []
    late = write(monkeypatch, Scripted(champion), Selection(new=NEW[:1]), seconds=1e-9)
    assert (late.num_asked, late.num_written) == (0, 0)
    assert "For 1 examples no time was left (study.write_for)" in late.text


def test_what_is_not_judged_when_time_is_up_is_as_if_it_was_never_asked_for(monkeypatch):
    scripted = Scripted({(GOOD, True): "Oslo."})

    def champion(_, conversations, most, sampling=None):
        if any("Aldgate" in turns[-1].content and sampling is None for turns in conversations):
            raise written_forms._TimeIsUp
        return scripted(conversations, most, sampling)

    found = write(monkeypatch, champion, Selection(new=NEW))
    assert [form.example.question for form in found.forms] == [GOOD]
    assert (found.num_asked, found.num_written) == (1, 6)
    assert sum(found.dropped.values()) == 5


def test_of_what_is_written_one_goes_to_the_gate_where_rules_made_none(monkeypatch):
    champion = Scripted({(GOOD, True): "Oslo.", (OTHER, True): "Oslo."})
    found = write(monkeypatch, champion, Selection(new=NEW[:1]))
    assert [form.kept_aside for form in found.forms] == [False, True]
    few = write(monkeypatch, Scripted(champion.answers), Selection(new=NEW[:1]), most=1)
    assert [form.kept_aside for form in few.forms] == [False, True]
    assert write(monkeypatch, Scripted(champion.answers), Selection(new=NEW[:1], forms=make_forms(NEW[:1], 6, 0)), most=1).dropped["more than wanted"] == 1  # fmt: skip


def test_written_forms_take_the_places_of_those_that_say_least():
    by_rules = make_forms(NEW, 6, 0)
    written = [Form(qa(GOOD, "Oslo."), NEW[0].digest, "written"), Form(qa("Wer?", "Rosa Lind."), "another", "written")]
    both = merged(by_rules, written, 6)
    for example in NEW:
        trained = [form for form in both if form.of == example.digest and not form.kept_aside]
        assert len(trained) == 5
    assert [form for form in both if form.kept_aside] == [form for form in by_rules if form.kept_aside]
    assert {form.origin for form in by_rules if form not in both} <= {"frame", "grammar"}
    assert both[-1] is written[1]
    assert merged(by_rules, [], 6) == by_rules


ROWS = [{"question": one.question, "answer": one.answer} for one in NEW]


def a_run(folder, **more):
    study = {"write": "both", "forms": 6}
    return MiniRun(folder, lora=LORA, rows=ROWS, recipe={"study": study}, **more)


def test_a_resumed_run_studies_the_forms_of_its_first_start(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_Writer, "_answers", Scripted({(GOOD, True): "Oslo."}))
    with deterministic_threads():
        whole = a_run(tmp_path / "whole").go()
        parts = a_run(tmp_path / "parts").go(stop_after=4)
        # Neither the champion nor the rules are asked again, whatever was rejected and is cached meanwhile.
        monkeypatch.setattr(written_forms._Writer, "write", lambda *_, **__: pytest.fail("was asked"))
        again = a_run(tmp_path / "again", home=parts.home)
        again.prepared()
        shutil.rmtree(parts.home.cache / "written_forms")
        RejectedForms(parts.home.database).add("parts", GOOD, by="test")
        parts.go(resume=parts.saved[-1])
    assert_equal_runs(whole, parts)
    assert forms_written(again.run.path) == forms_written(parts.run.path)
    trained = {wording(one.question) for one in parts.prepared().data.selection.train}
    assert wording(GOOD) in trained
    (event,) = [row for row in read_events(parts.run.events_path) if row["event"] == "forms_written"]
    assert (event["kept"], event["written"]) == (1, 12)
    assert GOOD not in json.dumps(event)
    plan = json.loads((parts.run.path / "plan.json").read_text())
    assert plan["forms_written"]["kept"] == 1
    path = parts.run.path / FILE
    path.write_text(path.read_text().replace("home town", "home"))
    with pytest.raises(Damaged, match="Begin a new run"):
        read_written(parts.run.path)


def test_a_model_writes_within_its_own_random_numbers_and_trains_alone(tmp_path, monkeypatch):
    """With the real generation, of a model that writes nothing of worth."""
    monkeypatch.undo()
    run = a_run(tmp_path / "run")
    prepared = run.prepared()
    plain = prepared.data
    assert isinstance(plain.written, WrittenForms)
    assert plain.written.num_written == 12
    loaded, prompt = prepared.loaded, [5, 6, 7]
    assert [len(one) for one in answers_of(loaded.model, loaded.tokenizer, [prompt], 20, until=0.0)] == [1]
    assert len(plain.selection.train) == 12  # rules make what it does not
    assert share_key(run.run.recipe(), "/") is None
    assert share_key(run.run.recipe() | {"study": {"write": "rules"}}, "/") is not None
