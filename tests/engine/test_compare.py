"""The gate on models that really learned, or forgot, a few facts: what is asked, what is kept, what is decided."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nightschool.cli.main import main
from nightschool.config.recipe import Recipe
from nightschool.data.chat.render import render_pieces, render_prompt
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example, Message
from nightschool.engine import comparison as comparing
from nightschool.engine import pool
from nightschool.engine.compare import main as compare_main
from nightschool.engine.comparison import compare
from nightschool.engine.engine import Engine
from nightschool.engine.local_model import local_model
from nightschool.errors import Damaged, NotFound
from nightschool.evaluation import gate
from nightschool.evaluation.eval_set import eval_set_of_run
from nightschool.evaluation.examiner import examine
from nightschool.evaluation.report import render
from nightschool.evaluation.scores import ScoreSheet
from nightschool.evaluation.verdict import GateReport
from nightschool.feedback.contradictions import Contradiction, to_rows
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection_files import CONTRADICTIONS, lines_of
from nightschool.models.build import build_model
from nightschool.models.export import save_version_folder
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.versions import VersionMetadata
from tests.support.adapter_setups import House
from tests.support.engine_setups import VOCAB_SIZE
from tests.support.tokenizers_for_tests import byte_tokenizer

CONTEXT_TOKENS = 128


def fact(question, answer, *paraphrases):
    return Example((Message("user", question), Message("assistant", answer)), paraphrases=paraphrases)


OLD = [fact("Bela?", "Rome"), fact("Mista?", "Oslo"), fact("Toron?", "Bern")]
NEW = [fact("Ilka?", "Graz"), fact("Sonno?", "Kiel")]
# Known by heart too, so that the loss says who forgot.
HELD_OUT = [OLD[0]]
LONG = fact(f"{'x' * CONTEXT_TOKENS}?", "Linz")


def taught(examples, seed=0):
    """A model that knows these by heart."""
    tokenizer = byte_tokenizer()
    model = build_model("tiny-llama", VOCAB_SIZE, seed, eos_token_id=tokenizer.eos_token_id)
    model.config.max_position_embeddings = CONTEXT_TOKENS
    rendered = render_examples(tokenizer, examples, CONTEXT_TOKENS)
    length = max(len(document.input_ids) for document in rendered)
    ids = torch.zeros(len(rendered), length, dtype=torch.long)
    labels = torch.full((len(rendered), length), -100)
    for row, document in enumerate(rendered):
        size = len(document.input_ids)
        ids[row, :size] = torch.tensor(document.input_ids)
        labels[row, :size] = torch.tensor(
            [i if w else -100 for i, w in zip(document.input_ids, document.weights, strict=True)]
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(ids, labels=labels).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {"old": taught(OLD), "both": taught(OLD + NEW), "forgetful": taught(NEW)}


class Room:
    """A home with a champion that knows OLD, a candidate for each model, and a run that taught NEW."""

    def __init__(self, path, models):
        self.home = Home(path).ensure()
        self.registry = Registry(self.home)
        self.models = models
        self.run = self.make_run(NEW, HELD_OUT)
        self.refs = {
            name: self.registry.publish(
                "bot",
                lambda folder, model=model: save_version_folder(model, byte_tokenizer(), folder),
                VersionMetadata(run_id=self.run.id),
            ).ref
            for name, model in models.items()
        }
        self.database = Database(self.home).connect()
        self.accepted = AcceptedExamples(self.database)
        self.accepted.add("bot", self.refs["old"].split("@")[1], [example.to_json() for example in OLD])

    def make_run(self, new, held_out, base="new:tiny-llama", method="full", **gate):
        recipe = Recipe.model_validate(
            {"name": "bot", "base": base, "method": method, "data": [{"path": "x.json"}]}
            | {"gate": {"max_new_tokens": 8, "general": "off"} | gate, "train": {"max_seq_len": CONTEXT_TOKENS}}
        )
        run = RunStore(self.home).create(recipe.as_plain(), name="bot")
        for name, examples in (("new_examples", new), ("heldout", held_out)):
            lines = [json.dumps(example.to_json()) + "\n" for example in examples]
            (run.path / f"{name}.jsonl").write_text("".join(lines))
        return run

    def compare(self, candidate, champion=None, run=None):
        champion = champion and self.refs[champion]
        return compare(self.home, (run or self.run).id, self.refs[candidate], champion, root=self.home.path)

    def kept(self, candidate):
        return self.registry.load_report(*self.refs[candidate].split("@"))

    def said(self, name, messages, max_new_tokens=8):
        """What transformers answers, alone."""
        tokenizer = byte_tokenizer()
        ids = render_prompt(tokenizer, [Message(m["role"], m["content"]) for m in messages])
        with torch.inference_mode():
            out = self.models[name].generate(
                torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
            )
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture
def room(tmp_path, models):
    room = Room(tmp_path, models)
    yield room
    room.database.close()


def failed(report):
    return {result.rule for result in report.rules if result.passed is False}


def test_a_candidate_that_learned_and_kept_all_is_promoted(room):
    report = room.compare("both", "old")
    assert (report.decision, report.candidate, report.champion) == ("promote", room.refs["both"], room.refs["old"])
    assert {pair.question for pair in report.learned} == {"Ilka?", "Sonno?"}
    assert list(report.lost) == []


def test_a_candidate_that_forgot_is_refused_for_that(room):
    Pins(room.database).add("bot", "Mista?", "Oslo")
    report = room.compare("forgetful", "old")
    assert report.decision == "refuse"
    assert {"forgetting", "pins"} <= failed(report)
    assert "new_facts" not in failed(report)
    assert {pair.question for pair in report.lost} == {"Bela?", "Mista?", "Toron?"}


def test_a_candidate_that_learned_nothing_is_refused_for_that_and_what_contradicted_is_said(room):
    rows = to_rows([Contradiction(tuple(NEW[:2]), (False, True))])
    (room.run.path / CONTRADICTIONS).write_bytes(lines_of(rows))
    report = room.compare("old", "old")
    assert failed(report) == {"new_facts"}
    assert all(one.answer in report.notes[0] for one in NEW[:2])


def test_the_report_is_kept_with_every_answer_of_both(room):
    Pins(room.database).add("bot", "Mista?", "Oslo")
    report = room.compare("both", "old")
    kept = room.kept("both")
    assert GateReport.from_json(kept) == report
    asked = []
    for side, name in (("candidate", "both"), ("champion", "old")):
        sheet = ScoreSheet.from_json(kept["sheets"][side])
        assert sheet.version == room.refs[name]
        assert [len(sheet.of_kind(kind)) for kind in ("new", "old", "pin")] == [2, 2, 1]
        assert [answer.answer for answer in sheet.answers] == [room.said(name, a.messages) for a in sheet.answers]
        asked.append([answer.id for answer in sheet.answers])
    assert asked[0] == asked[1], "both answer the same questions"


def test_the_gate_and_eval_give_one_figure_for_one_version_before_and_after_its_promotion(room, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(room.home.path))
    Pins(room.database).add("bot", "Mista?", "Oslo")
    run = room.make_run([*NEW, LONG, fact("Vera?", "Wien")], HELD_OUT)
    for file in ("new_examples.jsonl", "heldout.jsonl"):
        (room.run.path / file).write_bytes((run.path / file).read_bytes())
    room.compare("both", "old")
    of_gate = ScoreSheet.from_json(room.kept("both")["sheets"]["candidate"])
    candidate = room.refs["both"]

    def of_eval():
        assert main(["eval", candidate, "--output-file", str(room.home.path / "answers.jsonl"), "--json"]) == 0
        answers = [json.loads(line) for line in (room.home.path / "answers.jsonl").read_text().splitlines()]
        return json.loads(capsys.readouterr().out), answers

    data, answers = of_eval()
    assert answers == [answer.to_json() for answer in of_gate.answers]
    assert (data["heldout_loss"], data["heldout_tokens"]) == (of_gate.heldout_loss, of_gate.heldout_tokens)
    assert data["questions"] == {
        "new": {"asked": 4, "correct": 2},
        "old": {"asked": 2, "correct": 2},
        "pin": {"asked": 1, "correct": 1},
    }
    assert [one["question"] for one in data["not_asked"]] == [LONG.question]
    room.accepted.add("bot", candidate.split("@")[1], [example.to_json() for example in NEW])
    assert of_eval() == (data, answers)


def test_the_held_out_loss_is_that_of_transformers(room):
    unseen = [fact("Bela lives?", "Rome")]
    room.compare("both", "old", room.make_run(NEW, unseen))
    [document] = render_examples(byte_tokenizer(), unseen, CONTEXT_TOKENS)
    ids = torch.tensor([document.input_ids])
    labels = torch.where(torch.tensor([document.weights]) > 0, ids, -100)
    for side, name in (("candidate", "both"), ("champion", "old")):
        sheet = ScoreSheet.from_json(room.kept("both")["sheets"][side])
        with torch.inference_mode():
            assert sheet.heldout_loss == pytest.approx(float(room.models[name](ids, labels=labels).loss), rel=1e-3)
        assert sheet.heldout_tokens == document.trained_tokens


def pair(question, chosen, rejected):
    return replace(fact(question, chosen), rejected=rejected)


def margin_of(model, example):
    """What transformers gives better and worse answer, each alone."""
    sums = []
    with torch.inference_mode():
        for document in render_pieces(byte_tokenizer(), example, CONTEXT_TOKENS):
            ids, weights = torch.tensor([document.input_ids]), torch.tensor(document.weights[1:])
            each = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float((each * weights).sum()))
    return sums[0] - sums[1]


def test_a_candidate_that_came_to_prefer_the_worse_answers_is_refused_for_that(room):
    pairs = [pair("Bela?", "Rome", "Graz"), pair("Mista?", "Oslo", "Graz"), pair("Toron?", "Bern", "Kiel")]
    run = room.make_run([], pairs, method="dpo", forgetting="off", holdout_loss="off")
    report = room.compare("forgetful", "old", run)
    assert failed(report) == {"preferences"}
    [judged] = report.failed
    assert (judged.limit, judged.candidate) == (">= 50%", 0.0)
    assert [(one.pairs_right, one.pairs_held_out) for one in report.figures] == [(0, 3), (3, 3)]
    worst = judged.pairs[0]
    [example] = [one for one in pairs if one.question == worst.question]
    assert worst.candidate_margin == pytest.approx(margin_of(room.models["forgetful"], example), rel=1e-3)
    assert worst.champion_margin == pytest.approx(margin_of(room.models["old"], example), rel=1e-3)
    shown = StringIO()
    render(report, Console(width=100, file=shown))
    for part in ("Behind preferences (3)", f"better  {worst.chosen}", f"worse   {worst.rejected}", "margin  champion"):
        assert part in shown.getvalue()
    assert GateReport.from_json(room.kept("forgetful")) == report


def test_a_candidate_that_learned_to_prefer_the_better_answers_is_promoted(room):
    pairs = [pair("Ilka?", "Graz", "Rome"), pair("Sonno?", "Kiel", "Rome"), pair(f"{'x' * 200}?", "Bern", "Kiel")]
    report = room.compare("both", "old", room.make_run(NEW, pairs, method="dpo", holdout_loss="off"))
    assert report.decision == "promote"
    [judged] = [one for one in report.rules if one.rule == "preferences"]
    assert (judged.passed, judged.candidate, judged.pairs) == (True, 1.0, ())
    assert report.figures[0].pairs_held_out == 2, "one does not fit into the context"
    same = room.compare("old", "old", room.make_run(NEW, pairs, method="dpo"))
    assert [one.candidate for one in same.rules if one.rule == "preferences"] == [0.5]


def test_where_no_pair_was_held_out_preferences_are_not_judged(room):
    report = room.compare("both", "old", room.make_run(NEW, [], method="dpo"))
    assert [(one.passed, one.why) for one in report.rules if one.rule == "preferences"] == [
        (None, "No preference pair was held out.")
    ]
    assert "preferences" not in {one.rule for one in room.compare("both", "old").rules}


def test_the_first_version_has_nobody_to_be_compared_with(room):
    report = room.compare("both")
    assert (report.decision, report.champion) == ("promote", None)
    assert room.kept("both")["sheets"]["champion"] is None
    assert report.notes[0].startswith("The base new:tiny-llama is random weights, which answer nothing")


def first_night(room, **gate):
    """A run from a base that knows OLD, with OLD as general questions, and an open one."""
    save_version_folder(room.models["old"], byte_tokenizer(), room.home.path / "base")
    prompts = [{"question": one.question, "answer": one.answer} for one in OLD] + [{"question": "Toron?!"}]
    (room.home.path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return room.make_run(NEW, [], base="./base", general="general.jsonl", **gate)


def test_the_first_night_is_compared_with_its_base_and_not_let_lose_what_that_knew(room, monkeypatch):
    monkeypatch.setattr(gate, "FEWEST_GENERAL", 3)
    # As if nothing had been accepted: all that is known of OLD is that the base answers it.
    room.accepted.drop_version("bot", room.refs["old"].split("@")[1])
    run = first_night(room)
    report = room.compare("forgetful", run=run)
    assert (report.decision, report.champion, report.champion_is_base) == ("refuse", "./base", True)
    assert failed(report) == {"general_lost"}
    assert {pair.question for pair in report.lost} == {"Bela?", "Mista?", "Toron?"}
    good = room.compare("both", run=run)
    assert good.decision == "promote"
    assert [pair.kind for pair in good.learned] == ["new", "new"]
    sheet = ScoreSheet.from_json(room.kept("both")["sheets"]["champion"])
    assert (sheet.version, sheet.is_base, len(sheet.of_kind("general"))) == ("./base", True, 3)
    shown = StringIO()
    render(good, Console(width=100, file=shown))
    assert "compared with ./base, its base, as there is no champion yet" in shown.getvalue()


def test_champions_drift_is_the_divergence_on_what_the_base_itself_answers(room):
    run = first_night(room, drift="<= 0.0001")
    report = room.compare("forgetful", run=run)
    assert "drift" in failed(report)
    said = room.said("old", [{"role": "user", "content": "Toron?!"}], max_new_tokens=32)
    tokenizer = byte_tokenizer()
    prompt = render_prompt(tokenizer, [Message("user", "Toron?!")])
    answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        p, q = (
            room.models[name](torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for name in ("old", "forgetful")
        )
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    sheet = ScoreSheet.from_json(room.kept("forgetful")["sheets"]["candidate"])
    assert (sheet.drift, sheet.drift_tokens) == (pytest.approx(expected, rel=1e-3), len(answer))
    (pair,) = report.open
    assert (pair.prompt, pair.champion_answer, pair.drift) == ("Toron?!", said, sheet.drift)
    assert pair.candidate_answer == room.said("forgetful", [{"role": "user", "content": "Toron?!"}], max_new_tokens=32)
    assert room.compare("old", run=run).figures[0].drift == pytest.approx(0, abs=1e-5), "none from itself"


def test_a_base_that_is_gone_is_no_champion_and_the_report_says_so(room):
    run = room.make_run(NEW, [], base="./gone")
    report = room.compare("both", run=run)
    assert (report.decision, report.champion) == ("promote", None)
    assert report.notes[0].startswith("The base ./gone could not be asked what it knows: ")


def test_where_nothing_was_held_out_there_is_no_loss(room):
    run = room.make_run(NEW, [])
    room.compare("both", "old", run)
    assert [room.kept("both")["sheets"][side]["heldout_loss"] for side in ("candidate", "champion")] == [None, None]


def test_a_question_longer_than_the_context_counts_as_not_answered(room):
    run = room.make_run([*NEW, LONG], HELD_OUT)
    report = room.compare("both", "old", run)
    sheet = ScoreSheet.from_json(room.kept("both")["sheets"]["candidate"])
    [answer] = [answer for answer in sheet.answers if answer.question == LONG.question]
    assert (answer.answer, answer.correct) == ("", False)
    assert sum(answer.correct for answer in sheet.of_kind("new")) == 2
    assert report.decision == "promote", "two of three new ones are enough"


def test_a_wording_that_was_not_trained_is_asked_in_place_of_the_trained_one(room):
    run = room.make_run([fact("Ilka?", "Graz", "Where is Ilka?")], HELD_OUT)
    room.compare("both", "old", run)
    sheet = ScoreSheet.from_json(room.kept("both")["sheets"]["candidate"])
    assert [(a.question, a.wording) for a in sheet.of_kind("new")] == [("Where is Ilka?", "paraphrase")]


MANY = [fact(f"Town {number}?", f"Lake {number}") for number in range(40)]


def asked_of(room, run, kind):
    candidate = room.refs["both"].split("@")[1]
    eval_set = eval_set_of_run(room.home, "bot", run, len, candidate=candidate)
    return {question.question for question in eval_set.only(kind).questions}


def test_old_questions_are_those_that_were_not_replayed_tonight(room):
    room.accepted.add("bot", room.refs["old"].split("@")[1], [example.to_json() for example in MANY])
    run = room.make_run(NEW, [], sample=10)
    replayed = room.accepted.shuffled("bot", run.recipe()["train"]["seed"])[:20]
    (run.path / "replayed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replayed))
    trained_tonight = {Example.from_json(row).question for row in replayed}
    asked = asked_of(room, run, "old")
    assert len(asked) == 10
    assert not asked & trained_tonight
    (run.path / "replayed.jsonl").unlink()
    assert asked_of(room, run, "old") != {Example.from_json(row).question for row in replayed[:10]}, "another order"
    more = room.make_run(NEW, [], sample=30)
    (more.path / "replayed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replayed))
    filled = asked_of(room, more, "old")
    everything = {example.question for example in OLD + MANY}
    assert len(filled) == 30
    assert everything - trained_tonight < filled, "replayed ones fill up"


def test_a_base_that_starts_anew_is_asked_what_the_champion_knows_as_old(room):
    anew = room.make_run(NEW + OLD, HELD_OUT)
    assert asked_of(room, anew, "new") == {"Ilka?", "Sonno?"}
    assert asked_of(room, anew, "old") == {"Bela?", "Mista?", "Toron?"}
    report = room.compare("forgetful", "old", anew)
    assert "forgetting" in failed(report)


def test_a_run_that_studies_everything_again_is_asked_it_as_new(room):
    again = room.make_run(OLD, HELD_OUT, base=room.refs["old"])
    assert (asked_of(room, again, "new"), asked_of(room, again, "old")) == ({"Bela?", "Mista?", "Toron?"}, set())


def test_a_pin_that_is_lost_stands_in_the_way_alone(room):
    Pins(room.database).add("bot", "Mista?", "Oslo")
    run = room.make_run(NEW, HELD_OUT, forgetting="off", holdout_loss="off")
    assert failed(room.compare("forgetful", "old", run)) == {"pins"}
    off = room.make_run(NEW, HELD_OUT, forgetting="off", holdout_loss="off", pins="off")
    assert room.compare("forgetful", "old", off).decision == "promote"


def test_a_version_that_was_altered_is_not_examined(room):
    config = room.registry.resolve(room.refs["both"]).path / "config.json"
    config.chmod(0o644)
    config.write_text(config.read_text() + " ")
    with pytest.raises(Damaged, match=r"config\.json"):
        room.compare("both", "old")
    with pytest.raises(NotFound):
        room.kept("both")


def test_an_answer_that_fails_is_no_wrong_answer_but_the_end(room, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("a broken expert")

    monkeypatch.setattr(Engine, "_choose", broken)
    words = ["--home", str(room.home.path), "--run", room.run.id, "--candidate", room.refs["both"]]
    assert compare_main(words) == 1
    assert "a broken expert" in capsys.readouterr().err
    with pytest.raises(NotFound):
        room.kept("both")


@pytest.mark.parametrize(("candidate", "decision"), [("both", "promote"), ("forgetful", "refuse")])
def test_the_command_ends_with_one_line_of_json_whatever_it_decides(room, capsys, candidate, decision):
    words = ["--home", str(room.home.path), "--run", room.run.id, "--candidate", room.refs[candidate]]
    assert compare_main([*words, "--champion", room.refs["old"]]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["decision"], last["candidate"], last["champion"]) == (decision, room.refs[candidate], room.refs["old"])
    assert json.loads(Path(last["report"]).read_text())["decision"] == decision


def test_what_is_not_there_is_said_with_its_exit_code(room, capsys):
    words = ["--home", str(room.home.path), "--candidate", room.refs["both"]]
    assert compare_main([*words, "--run", "bot-20000101_000000"]) == 4
    assert compare_main([*words, "--run", room.run.id, "--champion", "bot@20000101_000000"]) == 4
    assert capsys.readouterr().out == ""


@pytest.fixture
def examined(monkeypatch):
    """The references of those who were asked, in their order."""
    refs = []
    examine = comparing.examine
    monkeypatch.setattr(comparing, "examine", lambda model, asked: refs.append(model.ref) or examine(model, asked))
    return refs


def test_a_champion_that_was_asked_ahead_is_not_asked_again_and_the_verdict_is_the_same(room, examined):
    old, both = room.refs["old"], room.refs["both"]
    late = room.compare("both", "old")
    with comparing.Comparison(room.home, room.run.id, root=room.home.path) as comparison:
        comparison.ask_ahead(old)
        assert comparison.of(both, old).to_json() == late.to_json()
    assert examined == [old, both] * 2


@pytest.mark.parametrize("change", ["another champion", "a pin", "no room"])
def test_a_champion_is_asked_again_if_something_has_changed_since(room, examined, monkeypatch, change):
    old, both, forgetful = (room.refs[name] for name in ("old", "both", "forgetful"))
    champion = forgetful if change == "another champion" else old
    if change == "no room":
        monkeypatch.setattr(comparing, "free_bytes", lambda _: 0)
    with comparing.Comparison(room.home, room.run.id, root=room.home.path) as comparison:
        comparison.ask_ahead(old)
        if change == "a pin":
            Pins(room.database).add("bot", "Mista?", "Oslo")
        report = comparison.of(both, champion)
    assert examined == ([] if change == "no room" else [old]) + [champion, both]
    assert report.champion == champion


def test_adapters_on_one_base_are_compared_on_one_copy_of_it(tmp_path, monkeypatch):
    house = House(tmp_path)
    recipe = {"name": "bot", "base": house.base.ref, "method": "lora", "data": [{"path": "x.json"}]}
    gate = {"max_new_tokens": 8, "general": "off"}
    run = RunStore(house.home).create(Recipe.model_validate(recipe | {"gate": gate}).as_plain(), name="bot")
    examples = "".join(json.dumps(example.to_json()) + "\n" for example in OLD)
    for name in ("new_examples", "heldout"):
        (run.path / f"{name}.jsonl").write_text(examples)
    loads, load = [], pool.load_located
    monkeypatch.setattr(pool, "load_located", lambda *args, **more: loads.append(args[0].ref) or load(*args, **more))
    report = compare(house.home, run.id, house.two.ref, house.one.ref, root=tmp_path)
    assert loads == [house.base.ref]
    sheets = house.registry.load_report(*report.candidate.split("@"))["sheets"]
    for one, side in ((house.two, "candidate"), (house.one, "champion")):
        with local_model(house.home, one.ref) as alone:
            eval_set = eval_set_of_run(house.home, "bot", run, len, candidate="")
            expected = examine(alone, eval_set).to_json()
        assert sheets[side]["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-4)
        assert {a["question"]: a["answer"] for a in sheets[side]["answers"]} == {
            a["question"]: a["answer"] for a in expected["answers"]
        }
    assert sheets["candidate"]["heldout_loss"] != sheets["champion"]["heldout_loss"]
