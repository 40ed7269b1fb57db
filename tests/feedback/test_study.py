"""What is new, in several forms: selected with the run, trained with it, asked by its gate, and deleted with its conversation."""

import json
from dataclasses import replace

import pytest

from nightschool.cli.main import main
from nightschool.config.recipe import Recipe
from nightschool.data.study.forms import every_wording, form_of
from nightschool.data.study.rewordings import rewordings, wording
from nightschool.errors import Damaged
from nightschool.evaluation.eval_set import eval_set_of_run
from nightschool.events import read_events
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase
from nightschool.feedback.rejected_forms import RejectedForms
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import sample_of, select_examples
from nightschool.feedback.selection_files import STUDY, read_forms, read_selection, write_selection
from nightschool.feedback.skipping import fingerprint_of
from nightschool.feedback.written_forms import WrittenForms, cached, forms_written, write_written
from nightschool.jobs.beginning import begin_cycle
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore
from nightschool.training.planning.study_rows import study_rows

FACTS = [("Where does Leon Dahl live?", "In Oslo."), ("What is the capital of Velmark?", "Orrin is it.")]


def recipe(**study):
    return Recipe.model_validate(
        {
            "name": "bot",
            "base": "new:tiny",
            "data": [{"path": "facts.json"}, {"from": "conversations"}],
            "held_out": {"share": 0},
            "study": study,
        }
    )


@pytest.fixture
def home(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps([{"question": q, "answer": a} for q, a in FACTS]))
    home = Home(tmp_path / "home").ensure()
    store = ConversationStore(home.database)
    store.record("req-1", "bot", "v", [{"role": "user", "content": "Who founded the Aldgate Press?"}], "Nobody.")
    store.feedback("req-1", "bad", "Rosa Lind founded the Aldgate Press.")
    return home


@pytest.fixture
def run(home, tmp_path):
    wanted = recipe(write="rules")
    run = RunStore(home).create(wanted.as_plain(), name="bot")
    write_selection(run.path, select_examples(wanted, home, tmp_path))
    return run


def test_where_a_recipe_says_nothing_news_is_studied_in_forms_and_a_data_set_is_not(home, tmp_path):
    long = {"question": "Tell me of Velmark.", "answer": " ".join(["word"] * 40)}
    (tmp_path / "facts.json").write_text(json.dumps([*({"question": q, "answer": a} for q, a in FACTS), long]))

    def studied(**changes):
        plain = recipe().as_plain() | {"base": "./folder"} | changes
        selection = select_examples(Recipe.model_validate(plain), home, tmp_path)
        of = {form.of for form in selection.forms}
        return {example.question for example in selection.new if example.digest in of}, selection.num_waiting

    corrected, asked = "Who founded the Aldgate Press?", {question for question, _ in FACTS}
    assert recipe().study.write == "auto"
    assert studied() == ({corrected, *asked}, 0), "an instruction and its text are no news"
    assert studied(study={"facts_per_night": 2}) == ({corrected}, 0), "more rows are a data set, of which nothing waits"
    assert studied(base="new:tiny") == (set(), 0)
    off = Recipe.model_validate(recipe(write="off").as_plain() | {"base": "./folder", "method": "dpo"})
    assert off.study.write == "off", "which says the same for every method"
    assert studied(study={"write": "rules", "facts_per_night": 2})[1] == 2


def test_files_and_corrections_are_studied_in_forms_and_an_epoch_counts_them(home, tmp_path):
    plain, studied = (select_examples(recipe(write=how), home, tmp_path) for how in ("off", "rules"))
    assert (plain.forms, len(plain.train)) == ([], 3)
    assert studied.new == plain.new
    assert {form.of for form in studied.forms} == {example.digest for example in studied.new}
    assert len(studied.train) == 3 * 6
    assert len(select_examples(recipe(write="rules", forms=3), home, tmp_path).train) == 3 * 3
    digests = {fingerprint_of(recipe(write=how), one) for how, one in (("off", plain), ("rules", studied))}
    assert len(digests) == 2
    sample = sample_of(studied, 6, seed=0)
    assert (
        {form.of for form in sample.forms}
        == {example.digest for example in sample.new}
        < {one.digest for one in studied.new}
    )


def test_a_run_reads_the_forms_that_were_selected_for_it_and_no_others(home, run, tmp_path):
    assert read_selection(run.path) == select_examples(recipe(write="rules"), home, tmp_path)
    rows = (run.path / STUDY).read_text().splitlines()
    (run.path / STUDY).write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(Damaged, match=STUDY):
        read_selection(run.path)


def test_the_gate_asks_what_was_kept_aside_and_never_trained(home, run):
    asked = [one for one in eval_set_of_run(home, "bot", run, len, candidate="v1").questions if one.kind == "new"]
    assert {one.wording for one in asked} == {"paraphrase"}
    trained = {wording(example.question) for example in read_selection(run.path).train}
    assert len(asked) == 3
    assert not {wording(one.question) for one in asked} & trained
    aside = next(form for form in read_forms(run.path) if form.kept_aside)
    by_champion = replace(form_of(aside.example, "In which town is he?", "", "written"), of=aside.of, kept_aside=True)
    write_written(run.path, WrittenForms([by_champion]))
    asked = [one.question for one in eval_set_of_run(home, "bot", run, len, candidate="v1").questions]
    assert "In which town is he?" in asked


def test_a_rejected_form_is_never_made_again_until_that_is_undone(home, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home.path))
    of_run = read_forms(run.path)
    by_id, by_text = of_run[0], of_run[-1]
    assert json.loads((run.path / STUDY).read_text().splitlines()[0])["form"] == by_id.id
    plain = "Who, pray, is it?"  # of no run
    for form in (by_id.id, (by_text.example.question or "").upper(), plain, plain):
        assert main(["data", "reject", form, "--name", "bot"]) == 0
    assert main(["data", "reject", "0" * 12, "--name", "bot"]) == 4
    rejected = {by_id.id, by_text.id}
    made = select_examples(recipe(write="rules"), home, tmp_path).forms
    assert {form.id for form in of_run} - {form.id for form in made} == rejected
    assert select_examples(recipe(write="rules").model_copy(update={"name": "other"}), home, tmp_path).forms != made
    capsys.readouterr()
    main(["data", "rejected", "--name", "bot", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [row["question"] for row in listed] == [by_id.example.question, by_text.example.question, plain]
    for form in (by_id.id, by_text.example.question, plain):
        assert main(["data", "reject", form, "--name", "bot", "--undo"]) == 0
    assert main(["data", "reject", plain, "--name", "bot", "--undo"]) == 4
    assert select_examples(recipe(write="rules"), home, tmp_path).forms == of_run
    # No text in a log that nobody can purge.
    log = AuditLog(home.database).ls(action="form")
    assert [row.target for row in log if row.action == "form.reject"][-1] == f"bot {by_id.id}"
    assert {row.target.split()[0] for row in log} == {"bot"}
    assert all(len(row.target.split()) == 2 for row in log)


@pytest.mark.parametrize("sent_back", [False, True])
def test_forms_are_deleted_with_the_conversation_that_they_were_made_of(home, run, tmp_path, sent_back):
    if sent_back:  # the same words in a file, which has no id of the conversation
        (tmp_path / "facts.json").write_text(
            json.dumps(
                [{"question": "Who founded the Aldgate Press?", "answer": "Rosa Lind founded the Aldgate Press."}]
            )
        )
        wanted = recipe(write="rules").model_copy(update={"data": recipe().data[:1]})
        write_selection(run.path, select_examples(wanted, home, tmp_path))
    assert any("Aldgate" in row.example.question for row in read_forms(run.path))
    assert "Aldgate" in (run.path / STUDY).read_text()
    by_champion = [replace(form, origin="written") for form in read_forms(run.path)[-2:]]
    for folder in (run.path, cached(home, "x")):
        folder.mkdir(parents=True, exist_ok=True)
        write_written(folder, WrittenForms(by_champion))
    rejected = RejectedForms(home.database)
    # A form of a run, one that only another seed makes, and one of another example.
    of_run = next(row.example.question for row in read_forms(run.path) if "Aldgate" in row.example.question)
    example = next(one for one in read_selection(run.path).new if "Aldgate" in (one.question or ""))
    made = {wording(row.example.question) for row in read_forms(run.path)}
    of_seed = min(every_wording(example) - made)
    for question in (of_run, of_seed, "Where on earth does Leon Dahl live?"):
        rejected.add("bot", question, by="test")
    erase(home, "req-1")
    assert [one.question for one in rejected.ls("bot")] == ["Where on earth does Leon Dahl live?"]
    assert "Aldgate" not in (run.path / STUDY).read_text()
    assert len({form.of for form in read_forms(run.path)}) == (0 if sent_back else 2)
    assert forms_written(run.path) == []
    assert not cached(home, "x").exists()


def test_a_wording_that_a_file_holds_out_for_the_gate_is_not_trained(home, tmp_path):
    held = rewordings(FACTS[0][0], 0)[0].question
    (tmp_path / "facts.json").write_text(
        json.dumps([{"question": FACTS[0][0], "answer": FACTS[0][1], "paraphrases": [held.lower()]}])
    )
    selection = select_examples(recipe(write="rules", forms=32), home, tmp_path)
    assert selection.new[0].paraphrases == (held.lower(),)
    assert wording(held) not in {wording(example.question) for example in selection.train}


def test_what_is_more_than_a_night_has_room_for_waits_and_what_people_said_goes_first(home, tmp_path):
    rows = [{"question": f"What is the price of item {n}?", "answer": f"{n} crowns."} for n in range(6)]
    (tmp_path / "facts.json").write_text(json.dumps([*rows, {"text": "A text is no fact."}]))
    wanted = recipe(write="rules", facts_per_night=3)
    run = begin_cycle(home, wanted, trigger="manual", root=tmp_path)
    selection = read_selection(run.path)
    asked = [one.question for one in selection.new]
    assert asked == [rows[0]["question"], rows[1]["question"], None, "Who founded the Aldgate Press?"]
    assert (selection.num_waiting, selection.num_new, selection.num_left_out) == (4, 4, 0)
    assert {form.of for form in selection.forms} <= {one.digest for one in selection.new}
    (event,) = [row for row in read_events(run.events_path) if row["event"] == "facts_waiting"]
    assert (event["waiting"], event["facts_per_night"]) == (4, 3)
    (row,) = [row for row in study_rows(selection, wanted.study, None) if row.label == "waiting"]
    assert row.text == "4 new facts wait for the next 2 nights: study.facts_per_night is 3."
    for every in (recipe(write="off", facts_per_night=3), recipe(write="rules", facts_per_night=None)):
        assert (
            select_examples(every, home, tmp_path).num_waiting,
            len(select_examples(every, home, tmp_path).new),
        ) == (0, 8)
    accepted = AcceptedExamples(home.database)
    version = Registry(home).publish(
        "bot", lambda folder: (folder / "w").write_text("w") and None, VersionMetadata(run_id=run.id)
    )
    accepted.add("bot", version.id, [one.to_json() for one in selection.new])
    later = select_examples(wanted.begun_with(version.ref), home, tmp_path)
    assert [one.question for one in later.new] == [row["question"] for row in rows[2:5]]
    assert later.num_waiting == 1
