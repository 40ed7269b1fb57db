"""What a night could not teach and needs exactness is proposed for an explicit memory, and one command keeps it there."""

import json

import pytest

from nightschool.cli.main import main
from nightschool.config.recipe import Gate, Recipe
from nightschool.data.example import Example, Message
from nightschool.data.study.forms import make_forms, with_wordings_kept_aside
from nightschool.evaluation.eval_set import eval_set_of_run
from nightschool.evaluation.gate import decide
from nightschool.evaluation.questions import make_questions
from nightschool.evaluation.scores import ScoreSheet
from nightschool.evaluation.taught_facts import as_entry, needs_exactness
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.promotion import promote
from nightschool.feedback.selection import Selection, select_examples
from nightschool.feedback.selection_files import write_selection
from nightschool.memory.adopted import in_memories
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version, make_run


def fact(question, answer, **more):
    return Example((Message("user", question), Message("assistant", answer)), **more)


@pytest.mark.parametrize(
    ("question", "answer", "exact"),
    [
        ("How long is a Brightwell voucher valid?", "A Brightwell voucher is valid for 18 months.", True),
        ("How many people live in Morvane?", "Three thousand people live in Morvane.", True),
        ("When was the mill built?", "The mill was built in May.", True),
        ("On which day is the market?", "The market is on Tuesday.", True),
        ("Where do I write to?", "Write to help@brightwell.example.", True),
        ("Where is the shop?", "The shop is at 14 Mill Lane.", True),
        ("Where does Ilka Brandt live?", "Ilka Brandt lives in Morvane.", False),
        ("Who repairs the 12 boats?", "Leon Dahl repairs the 12 boats.", False),
        ("Wo wohnt Ilka?", "Ilka wohnt in Morvane.", False),
        ("Wie lange gilt der Gutschein?", "18 Monate.", True),
    ],
)
def test_numbers_dates_and_addresses_need_exactness(question, answer, exact):
    assert needs_exactness(fact(question, answer)) is exact


def test_a_key_of_ones_own_decides_what_the_fact_is():
    assert not needs_exactness(fact("Where is the shop?", "At Mill Lane, open 14 hours.", key=("Mill Lane",)))


def test_an_entry_is_a_sentence_where_a_rule_makes_one():
    assert as_entry(fact("Where does Leon live?", "In Oslo.")) == "Leon lives in Oslo."
    assert as_entry(fact("How much is it, please?", "12 euros")) == "How much is it, please? 12 euros"


@pytest.fixture
def night(tmp_path, monkeypatch):
    """A version that was taught four facts and knows one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    home = Home(tmp_path / "home").ensure()
    new = [
        fact("Where does Ilka live?", "Ilka lives in Morvane."),
        fact("Where does Leon live?", "Leon lives in Orrin."),
        fact("How long is a voucher valid?", "A voucher is valid for 18 months."),
        fact("When does the shop open?", "The shop opens at 9:30.", source="conversations", id="chat-88"),
    ]
    forms = make_forms(new, 4, 0)
    run = make_run(home)
    write_selection(run.path, Selection(new=new, forms=forms, num_all=4, num_new=4))
    version = add_version(home, run_id=run.id)
    run.update_status(candidate=version.ref)
    questions = make_questions(with_wordings_kept_aside(new, forms), (), (), 50, 0)
    assert any(form.kept_aside for form in forms), "some are asked in a wording of their own"
    right = "Ilka lives in Morvane."
    sheet = ScoreSheet(
        version.ref, answers=tuple(one.answered(right if one.expected == right else "?") for one in questions)
    )
    report = decide(sheet, None, Gate()).to_json() | {"sheets": {"candidate": sheet.to_json(), "champion": None}}
    Registry(home).save_report(version.name, version.id, report)
    return home, run, version


def shown(capsys, *words):
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_exact_facts_move_into_a_memory_with_one_command(night, capsys):
    home, run, version = night
    command = f"nightschool memory adopt bot {version.ref}"
    for words in (("runs", "show", run.id), ("models", "report", version.ref)):
        lines = [" ".join(line.split()) for line in shown(capsys, *words).splitlines()]
        assert "facts 1 of 4 known by the weights, 3 nowhere" in lines
        assert "needs a memory How long is a voucher valid? A voucher is valid for 18 months." in lines
        assert f"keep them there {command}" in lines
        assert not any("Leon lives" in line and "needs a memory" in line for line in lines), "a place needs none"
    said = shown(capsys, *command.split()[1:])
    assert "bot is at revision" in said
    assert "2 added" in said
    assert f"know 1 of 4 facts. Read both: nightschool chat {version.ref} --memory bot" in said
    with MemoryStore.open(memory_path(home, "bot")) as store:
        entries = list(store.entries(at=store.revision))
    assert {(one.wording or one.text, one.source) for one in entries} == {
        ("A voucher is valid for 18 months.", version.ref),
        ("The shop opens at 9:30.", "chat-88"),
    }
    facts = json.loads(shown(capsys, "runs", "show", run.id, "--json"))["facts"]
    assert facts == {"asked": 4, "weights": 1, "memories": {"bot": 2}, "unknown": 1, "exact": []}
    assert "1 of 4 known by the weights, 2 in the memory bot, 1 nowhere" in shown(capsys, "runs", "show", run.id)
    assert "2 known already" in shown(capsys, *command.split()[1:])
    assert "1 added, 2 known already" in shown(capsys, *command.split()[1:], "--all")


def test_a_fact_in_a_memory_is_neither_studied_nor_asked_until_it_is_taken_back(night, capsys, tmp_path):
    home, run, version = night
    promote(home, "bot", version.id, by="test")  # it counts as learned, whether the version knows it or not
    rows = [Example.from_json(json.loads(line)) for line in (run.path / "new_examples.jsonl").read_text().splitlines()]
    taught = {one.question: one.answer for one in rows}
    exact = {"How long is a voucher valid?", "When does the shop open?"}
    data = tmp_path / "facts.json"

    def write(**changed):
        answers = taught | {"Who is Jo?": "Jo is new."} | changed
        data.write_text(json.dumps([{"query": one, "retrieved": said} for one, said in answers.items()]))

    def studied(base="bot@champion", **more):
        """What the next night studies, and what it replays."""
        plain = {"name": "bot", "base": base, "data": [{"path": "facts.json"}], "replay": {"ratio": 10}} | more
        plain["study"] = {"write": "off"}
        picked = select_examples(Recipe.model_validate(plain), home, tmp_path, in_memories(home, "bot"))
        return {one.question for one in picked.new}, {one.question for one in picked.replayed}, picked.num_held

    def asked_as_old():
        asked = eval_set_of_run(home, "bot", None, lambda text: len(text.split()), candidate="none")
        return {one.question for one in asked.questions if one.kind == "old"}

    write()
    assert studied() == ({"Who is Jo?"}, set(taught), 0)
    assert asked_as_old() == set(taught)
    shown(capsys, "memory", "adopt", "bot", version.ref)
    assert studied() == ({"Who is Jo?"}, set(taught) - exact, 2)
    assert studied("new:tiny")[0] == {"Who is Jo?", *taught} - exact, "new weights need not learn it either"
    assert studied("new:tiny", method="memory", memory={"stage": "router"})[0] >= exact, (
        "one that reads facts studies them"
    )
    assert asked_as_old() == set(taught) - exact

    shown(capsys, "memory", "edit", "bot", "m1", "A voucher is valid for 19 months.")
    assert studied()[2] == 2, "it was corrected where it lies"
    shown(capsys, "memory", "rm", "bot", "m1", "--yes")
    assert studied()[0] == {"Who is Jo?", "How long is a voucher valid?"}, "no place knows it"
    assert "1 of 4 known by the weights, 1 in the memory bot, 2 nowhere" in shown(capsys, "runs", "show", run.id)
    write(**{"When does the shop open?": "The shop opens at 10:15."})
    assert "When does the shop open?" in studied()[0], "a correction is a new fact"

    write()
    taught_again = make_run(home, minutes=5)
    write_selection(taught_again.path, Selection(new=rows))
    later = add_version(home, run_id=taught_again.id, parent=version.ref)
    promote(home, "bot", later.id, by="test")
    assert studied()[0] == {"Who is Jo?"}, "a later version was taught it"


def test_what_memories_hold_is_counted_where_data_are_checked_and_nights_begin(night, capsys, tmp_path):
    _, _, version = night
    shown(capsys, "memory", "adopt", "bot", version.ref)
    (tmp_path / "facts.json").write_text(
        json.dumps([{"query": "When does the shop open?", "retrieved": "The shop opens at 9:30."}])
    )
    (tmp_path / "night.yaml").write_text(
        "{name: bot, base: new:tiny, data: [{path: facts.json}], serve: {promote: never}}"
    )
    assert "held by memories   1" in shown(capsys, "data", "check", "night.yaml")
    assert "nothing to train: 1 fact is held by memories, and not studied" in shown(capsys, "train", "night.yaml")


def test_a_deleted_conversation_takes_its_entry_with_it(night, capsys):
    home, _, version = night
    asked = [{"role": "user", "content": "When does the shop open?"}]
    ConversationStore(home.database).record("chat-88", "bot", version.id, asked, "At noon.")
    ConversationStore(home.database).feedback("chat-88", "bad", "The shop opens at 9:30.")
    shown(capsys, "memory", "adopt", "bot", version.ref)
    assert "Purged: bot/m2." in shown(capsys, "data", "forget", "chat-88", "--yes")
    with MemoryStore.open(memory_path(home, "bot")) as store:
        assert [one.source for one in store.entries()] == [version.ref]


def test_what_cannot_be_adopted_is_said(night, capsys):
    home, run, version = night
    assert main(["memory", "adopt", "bot", "nobody@latest"]) == 4
    lonely = add_version(home, name="lonely")
    assert main(["memory", "adopt", "bot", lonely.ref]) == 4
    assert "came from no run" in capsys.readouterr().err
    assert not memory_path(home, "bot").exists(), "nothing was made"
    (run.path / "new_examples.jsonl").write_text(json.dumps(fact("Another?", "Yes.").to_json()) + "\n")
    assert main(["memory", "adopt", "bot", version.ref]) == 1
    assert shown(capsys, "runs", "show", run.id).startswith("run_id"), "a run is shown all the same"
