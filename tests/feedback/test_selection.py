"""Which examples a run studies, night after night: what is new to its base, what is replayed, what is held out."""

import json

import pytest

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, Message
from nightschool.data.sources.load import is_held_out
from nightschool.errors import NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.promotion import promote, roll_back
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import select_examples
from nightschool.feedback.selection_files import write_selection
from nightschool.feedback.training_data import load_sources
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore


def qa(question, answer, source="train.json"):
    return Example((Message("user", question), Message("assistant", answer)), source=source)


def said(examples):
    return sorted((example.question, example.answer) for example in examples)


class Nights:
    """A home where nights are selected, published and promoted without training."""

    def __init__(self, root):
        self.root = root
        self.home = Home(root / "home").ensure()
        self.registry = Registry(self.home)
        self.conversations = ConversationStore(Database(self.home).connect())
        self.pool = AcceptedExamples(Database(self.home).connect())
        self.sources = [{"path": "train.json"}, {"from": "conversations"}]
        self.base = "new:tiny"

    def write(self, *rows):
        (self.root / "train.json").write_text(json.dumps([{"query": q, "retrieved": a} for q, a in rows]))

    def correct(self, request_id, question, answer):
        self.conversations.record(request_id, "bot", "v", [{"role": "user", "content": question}], "wrong")
        self.conversations.feedback(request_id, "bad", answer)

    def recipe(self, **changes):
        plain = {"name": "bot", "base": self.base, "data": self.sources, "replay": {"ratio": 10}}
        return Recipe.model_validate(plain | changes)

    def select(self, **changes):
        return select_examples(self.recipe(**changes), self.home, self.root)

    def night(self, **changes):
        """Select, publish, promote; the next night begins with what this one made."""
        recipe = self.recipe(**changes)
        run = RunStore(self.home).create(recipe.as_plain(), name="bot")
        selection = select_examples(recipe, self.home, self.root)
        write_selection(run.path, selection)
        facts = VersionMetadata(run_id=run.id, parent=recipe.base if recipe.base.startswith("bot@") else None)
        version = self.registry.publish("bot", lambda folder: (folder / "w").write_text("w") and None, facts)
        promote(self.home, "bot", version.id, by="test")
        self.base = version.ref
        return selection


@pytest.fixture
def nights(tmp_path):
    return Nights(tmp_path)


def test_what_a_new_example_corrects_is_not_replayed(nights):
    nights.write(("Capital?", "Oslo"), ("Sea?", "North"))
    nights.night()
    nights.write(("Capital?", "Bergen"))
    selection = nights.select()
    assert said(selection.new) == [("Capital?", "Bergen")]
    assert said(selection.replayed) == [("Sea?", "North")]


def test_general_conversations_are_replayed_every_night_and_never_count_as_new(nights):
    general = [{"prompt": "Sky?", "completion": "Blue"}, {"prompt": "Capital?", "completion": "Rome"}]
    (nights.root / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    nights.write(("Capital?", "Oslo"), ("Sea?", "North"))
    with_general = {"replay": {"ratio": 10, "path": "general.jsonl"}}
    first = nights.night(**with_general)
    assert said(first.new) == [("Capital?", "Oslo"), ("Sea?", "North")]
    assert (first.replayed, said(first.general)) == ([], [("Sky?", "Blue")])
    assert first.fingerprint != nights.select().fingerprint
    nights.write(("Capital?", "Oslo"), ("Sea?", "North"), ("Hill?", "Ben"))
    second = nights.select(**with_general)
    assert said(second.new) == [("Hill?", "Ben")]
    assert said(second.replayed) == [("Capital?", "Oslo"), ("Sea?", "North")], "what is general is not accepted"
    assert said(second.general) == [("Sky?", "Blue")], "what was accepted goes before what the file says"
    assert said(second.train) == sorted(said(second.new) + said(second.replayed) + said(second.general))
    with pytest.raises(NotFound, match=r"replay\.path"):
        nights.select(replay={"path": "gone.jsonl"})


def test_what_was_accepted_is_replayed_in_its_forms_as_much_of_it_as_of_new_forms(nights):
    facts = [
        (f"Where does {who} live?", f"{who} lives in {place}.")
        for who, place in (("Ana", "Orrin"), ("Bo", "Dunmore"), ("Cy", "Velmark"))
    ]
    studied = {"study": {"write": "rules", "forms": 4}, "replay": {"ratio": 1}}
    nights.write(*facts[:1])
    first = nights.night(**studied)
    assert len(first.train) == 4
    nights.write(*facts[:2])
    second = nights.night(**studied)
    assert said(second.new) == facts[1:2]
    wordings = {example.question for example in second.replayed}
    assert len(wordings) == len(second.replayed) == 4
    assert {example.answer for example in second.replayed} == {facts[0][1]}
    assert facts[0][0] in wordings
    aside = {form.example.question for form in first.forms if form.kept_aside}
    assert aside
    assert not aside & wordings
    nights.write(*facts)
    third = nights.select(**studied)
    assert sorted({example.answer for example in third.replayed}) == [facts[0][1], facts[1][1]]
    assert len(third.replayed) == 4, "as many as the new fact has forms: each old fact in two of its own"
    assert len({example.question for example in third.replayed}) == 4
    assert said(nights.select(**studied | {"study": {"write": "off"}}).replayed) != said(third.replayed)
    assert len(nights.select(**studied | {"study": {"write": "off"}}).replayed) == 1


def test_what_was_corrected_stays_away_every_later_night_until_the_correction_is_rolled_back(nights):
    nights.write(("Capital?", "Oslo"), ("Sea?", "North"))
    nights.night()
    nights.correct("r1", "Capital?", "Bergen")
    assert said(nights.night().new) == [("Capital?", "Bergen")]
    nights.write(("Capital?", "Oslo"), ("Sea?", "North"), ("Lake?", "None"))  # the file still says Oslo
    third = nights.night(data=[{"path": "train.json"}])
    assert said(third.new) == [("Lake?", "None")]
    assert said(third.replayed) == [("Capital?", "Bergen"), ("Sea?", "North")]
    roll_back(nights.home, "bot", by="test")
    roll_back(nights.home, "bot", by="test")
    assert said(map(Example.from_json, nights.pool.shuffled("bot", 0))) == [("Capital?", "Oslo"), ("Sea?", "North")]


def test_nothing_new_but_started_all_the_same_does_not_study_what_was_corrected(nights):
    nights.write(("Capital?", "Oslo"))
    nights.night()
    nights.correct("r1", "Capital?", "Bergen")
    nights.night()
    assert said(nights.select().train) == [("Capital?", "Bergen")]


def test_a_correction_that_is_corrected_back_is_new_again(nights):
    nights.write(("Sea?", "North"))
    for answer in ("Oslo", "Bergen", "Oslo"):
        nights.correct(f"r{answer}{nights.base}".replace(":", "_").replace("@", "_"), "Capital?", answer)
        selection = nights.night()
        assert ("Capital?", answer) in said(selection.new)
    assert ("Capital?", "Bergen") not in said(map(Example.from_json, nights.pool.shuffled("bot", 0)))


def test_a_file_that_is_edited_back_is_new_again(nights):
    nights.sources = [{"path": "train.json"}]
    for answer in ("Oslo", "Bergen", "Oslo"):
        nights.write(("Capital?", answer))
        assert said(nights.night().train) == [("Capital?", answer)]


def test_several_answers_to_one_question_in_one_file_do_not_take_turns(nights):
    nights.sources = [{"path": "train.json"}]
    nights.write(("A joke?", "One"))
    nights.night()
    nights.write(("A joke?", "One"), ("A joke?", "Two"))
    assert said(nights.night().new) == [("A joke?", "Two")]
    assert nights.select().num_left_out == 1  # studies everything again, without the one that was replaced


def test_to_another_base_everything_is_new_and_stays_accepted(nights):
    nights.write(("Sea?", "North"), ("Lake?", "None"))
    nights.night()
    nights.sources[1]["since"] = "last_promoted"
    nights.correct("r1", "Capital?", "Bergen")
    nights.night()
    nights.write(("Lake?", "None"), ("Hill?", "High"))
    going_on = nights.select()
    assert (said(going_on.new), going_on.num_left_out) == ([("Hill?", "High")], 2)
    nights.base = "new:llama"
    anew = nights.night()
    assert said(anew.new) == [("Capital?", "Bergen"), ("Hill?", "High"), ("Lake?", "None")]
    assert said(anew.replayed) == [("Sea?", "North")]
    assert anew.num_left_out == 0
    # What it learned by replay it would lose again, if it did not stay in the pool.
    assert said(map(Example.from_json, nights.pool.shuffled("bot", 0))) == said(anew.train)


def test_an_older_version_as_base_has_not_learned_what_came_after_it(nights):
    nights.sources[1]["since"] = "last_promoted"
    nights.write(("Sea?", "North"))
    nights.night()
    first = nights.base
    nights.correct("r1", "Capital?", "Bergen")
    nights.night()
    nights.write(("Sea?", "North"), ("Hill?", "High"))
    assert said(nights.select(base=first).new) == [("Capital?", "Bergen"), ("Hill?", "High")]


def test_what_was_trained_is_not_held_out_when_the_data_grows(nights):
    rows = [(f"q{k}", f"a{k}") for k in range(120)]
    nights.write(*rows[:60])
    held_out = {"share": 0.5, "min_examples": 100}
    trained = nights.night(held_out=held_out).new
    assert len(trained) == 60
    nights.write(*rows)
    for base in (nights.base, "new:llama"):
        selection = nights.select(base=base, held_out=held_out)
        assert not {e.digest for e in trained} & {e.digest for e in selection.held_out}
        fresh = [qa(*row) for row in rows[60:]]
        assert said(selection.held_out) == said(e for e in fresh if is_held_out(e, 0.5)) != []


def test_since_the_last_promotion_means_always_to_another_base(nights):
    nights.write(("Sea?", "North"))
    nights.correct("r1", "Capital?", "Bergen")
    nights.night()
    recipe = nights.recipe(data=[{"from": "conversations", "since": "last_promoted"}])
    found = [
        load_sources(recipe.data, root=nights.root, home=nights.home, name="bot", base=base).examples
        for base in ("new:llama", "./folder", "bot-2@20250101_000000")
    ]
    assert [len(examples) for examples in found] == [1, 1, 1]
