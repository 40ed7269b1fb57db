"""Which prompts are rehearsed: what users asked by day, mixed with general ones, and nothing that is taught or asked."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, Message
from nightschool.data.study.forms import form_of
from nightschool.errors import UsageError
from nightschool.evaluation.rehearsed import choose_prompts
from nightschool.feedback.contradictions import Contradiction
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import Selection
from nightschool.store.home import Home

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def qa(question, answer="x", **more):
    return Example((Message("user", question), Message("assistant", answer)), **more)


class Days:
    """A home where users ask, and what a night would rehearse of it."""

    def __init__(self, root):
        self.root, self.home = root, Home(root / "home").ensure()
        self.store, self.count = ConversationStore(self.home.database), 0
        (root / "own.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in ("Own a?", "Own b?")))

    def ask(self, *turns, name="acme/bot", rating=None, correction=None):
        self.count += 1
        request_id = f"req-{self.count}"
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        time = BEGAN + timedelta(minutes=self.count)
        self.store.record(request_id, name, "v", [{"role": "system", "content": "Be kind."}, *messages], "a", time=time)
        if rating or correction:
            self.store.feedback(request_id, rating, correction)
        return request_id

    def chosen(self, *prompts, selection=None, fits=lambda _: True, **rehearse):
        plain = {"redact": [], "prompts": list(prompts)} | rehearse
        plain = {"name": "acme/bot", "base": "x", "data": [{"path": "d.json"}], "rehearse": plain}
        return choose_prompts(Recipe.model_validate(plain), self.home, self.root, selection or Selection(), fits)

    def questions(self, *prompts, **more):
        return [one.question for one in self.chosen(*prompts, **more).prompts]


@pytest.fixture
def days(tmp_path):
    return Days(tmp_path)


def test_what_users_asked_comes_newest_first_each_once_and_takes_turns_with_others(days):
    first = days.ask("Where is my parcel?")
    days.ask("How do I return it?")
    again = days.ask("where is  my parcel?")
    days.ask("Hello", "Hi.", "In the middle")
    assert days.questions("conversations") == ["where is  my parcel?", "How do I return it?"]
    assert days.chosen("conversations").prompts[0].conversations == (again, first)
    mixed = days.chosen("own.jsonl", "conversations").prompts
    assert [one.source for one in mixed] == ["own.jsonl", "conversations"] * 2
    assert days.questions("conversations", max_conversations=1) == ["where is  my parcel?"]
    (note,) = days.chosen("conversations").notes
    assert "2 prompts of 4 recorded answers of acme/bot" in note
    assert "1 in the middle of a conversation, 1 asked more than once" in note
    assert "parcel" not in note


def test_never_what_others_asked_what_was_wrong_or_what_is_taught_or_asked_tonight(days):
    days.ask("Of another tenant?", name="other/bot")
    days.ask("Of another name?", name="acme/aide")
    days.ask("Answered badly?", rating="bad")
    days.ask("Answered badly?")
    days.ask("Corrected?", correction="So.")
    days.ask("Far too long?")
    taken = ("New?", "Asked so?", "Held out?", "Replayed?", "A form?", "Contested?", "Pinned?", "Accepted?")
    for question in (*taken, "What is frozen water called?", "Free?"):
        days.ask(question.lower())
    new = qa("New?", paraphrases=("Asked so?",))
    contested = Contradiction((qa("Contested?"),), (False,))
    selection = Selection(
        [new], [qa("Replayed?")], [qa("Held out?")], forms=[form_of(new, "A form?", "x", "grammar")],
        contradictions=[contested],
    )  # fmt: skip
    Pins(days.home.database).add("acme/bot", "Pinned?", "x")
    AcceptedExamples(days.home.database).add("acme/bot", "v", [qa("Accepted?").to_json()])
    asked = {"selection": selection, "fits": lambda prompt: prompt != "Far too long?"}
    assert days.questions("conversations", **asked) == ["free?"]
    rows = [{"question": one} for one in (*taken, "Also free?")]
    (days.root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert days.questions("own.jsonl", **asked) == ["Also free?"]


def test_where_nothing_was_recorded_others_take_the_place_and_it_is_said(days):
    alone = days.chosen("conversations")
    assert {one.source for one in alone.prompts} == {"default"}
    assert alone.prompts == days.chosen("default").prompts
    assert "--record-conversations" in alone.notes[0]
    assert alone.notes[0].endswith("so the prompts of nightschool (default) alone are rehearsed.")
    days.ask("Bad?", rating="bad")
    beside = days.chosen("own.jsonl", "conversations")
    assert [one.source for one in beside.prompts] == ["own.jsonl"] * 2
    assert "0 prompts of 1 recorded answers" in beside.notes[0]
    assert "1 rated bad or corrected, so the prompts of own.jsonl alone" in beside.notes[0]


def test_personal_data_are_replaced_unless_a_recipe_says_otherwise(days, monkeypatch):
    pytest.importorskip("presidio_analyzer")
    ids = [days.ask(f"Write to {who}@x.org, please.") for who in ("ann", "bo")]
    (prompt,) = days.chosen("conversations", redact=["email"]).prompts
    assert (prompt.question, prompt.conversations) == ("Write to [EMAIL], please.", (ids[1], ids[0]))
    taught = Selection([qa("Write to [EMAIL], please.")])
    assert all(
        one.source == "default" for one in days.chosen("conversations", redact=["email"], selection=taught).prompts
    )
    kinds = Recipe.model_validate({"base": "x", "data": [{"path": "d"}]}).rehearse.redact
    assert kinds == ["key", "email", "card", "iban", "ip", "phone"]
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(UsageError, match=r"pip install 'nightschool\[redact\]'"):
        days.chosen("conversations", redact=["email"])


def test_what_is_off_is_off_and_nothing_else_goes_with_it():
    plain = {"base": "x", "data": [{"path": "d"}]}
    assert Recipe.model_validate(plain | {"rehearse": {"prompts": "off"}}).rehearse.prompts is None
    both = Recipe.model_validate(plain | {"rehearse": {"prompts": "default, conversations, default"}})
    assert both.rehearse.prompts == ["default", "conversations"]
    for wrong in ([], ["off", "default"]):
        with pytest.raises(ValueError, match="or is off"):
            Recipe.model_validate(plain | {"rehearse": {"prompts": wrong}})
