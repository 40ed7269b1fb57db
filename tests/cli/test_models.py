"""models, pins, data, config and schedule, without a model."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from nightschool.cli.main import main
from nightschool.config.recipe import Gate
from nightschool.evaluation.effort import Effort
from nightschool.evaluation.gate import decide
from nightschool.evaluation.scores import ProbeQuestion, ScoreSheet
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.jobs.scheduler import schedule_lock_path
from nightschool.models.export import save_version_folder
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version, make_run
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

RECIPE = "name: bot\nbase: new:tiny\ndata: [{path: train.json}]\nschedule: {every: 12h}\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    rows = [{"query": f"question {k}?", "retrieved": f"answer {k}"} for k in range(3)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return Home(tmp_path / "home").ensure()


def _json(capsys, *words, code=0):
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def _sheet(ref, answers, loss):
    questions = [
        ProbeQuestion(f"old-{k}", "old", f"Where is {k}?", f"In {k}land.", [{"role": "user", "content": "?"}])
        for k in range(len(answers))
    ]
    return ScoreSheet(ref, loss, 100, tuple(one.answered(text) for one, text in zip(questions, answers, strict=True)))


def _examined(home, champion, candidate):
    sheets = (
        _sheet(candidate.ref, ["In 0land.", "In Paris."], 1.5),
        _sheet(champion.ref, ["In 0land.", "In 1land."], 1.0),
    )
    checks = SpotCheck(5, 0.5, 0.01), SpotCheck(10, 0.75, 0.02)
    report = decide(*sheets, Gate(), effort=Effort(checks, step=10, passing="learned >= 50%")).to_json()
    report["sheets"] = {"candidate": sheets[0].to_json(), "champion": sheets[1].to_json()}
    Registry(home).save_report("bot", candidate.id, report)


def test_versions_are_listed_with_aliases_and_verdicts(home, capsys):
    first, second = add_version(home, heldout_loss=1.25), add_version(home)
    Registry(home).promote("bot", first.id, by="test")
    _examined(home, first, second)
    rows = _json(capsys, "models", "ls")
    assert [(row["ref"], row["aliases"], row["gate"]) for row in rows] == [
        (second.ref, ["latest"], "refuse"),
        (first.ref, ["champion"], None),
    ]
    assert main(["models", "ls", "bot"]) == 0
    out = capsys.readouterr().out
    assert "853k" in out
    assert "1.25" in out
    assert main(["models", "ls", "nobody"]) == 4


def test_show_has_facts_files_and_history(home, capsys):
    version = add_version(home, method="lora", kind="adapter", base="new:tiny")
    main(["models", "promote", version.ref])
    data = _json(capsys, "models", "show", "bot")
    assert data["method"] == "lora"
    assert set(data["files"]) == {"model.safetensors", "nightschool.json"}
    assert [(move["action"], move["after"]) for move in data["history"]] == [("promote", version.id)]
    assert main(["models", "show", "bot@champion"]) == 0
    assert "promote champion: - → " in capsys.readouterr().out


def test_the_report_names_the_rule_both_figures_and_the_lost_answer(home, capsys):
    first, second = add_version(home), add_version(home)
    Registry(home).promote("bot", first.id, by="test")
    _examined(home, first, second)
    assert main(["models", "report", second.ref]) == 0
    out = capsys.readouterr().out
    for part in (
        "REFUSED",
        "holdout_loss",
        "1.5000",
        "1.0000",
        "forgetting",
        "Where is 1?",
        "In Paris.",
        "which pass with learned >= 50%",
    ):
        assert part in out
    assert out.splitlines()[-1].split() == ["10", "75%", "0.0200", "published"]
    assert main(["models", "report", "bot", "-q"]) == 0
    assert capsys.readouterr().out == "refuse\n"
    assert _json(capsys, "models", "report", second.ref)["decision"] == "refuse"
    assert main(["models", "report", first.ref]) == 4


def test_diff_shows_the_answers_that_changed_word_by_word(home, capsys):
    first, second = add_version(home), add_version(home)
    _examined(home, first, second)
    data = _json(capsys, "models", "diff", first.ref, second.ref)
    assert (data["asked"], [one["verdict"] for one in data["differing"]]) == (2, ["lost"])
    assert main(["models", "diff", first.ref, second.ref]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 answers differ, held-out loss 1 → 1.5" in out
    assert "In [-1land.-]{+Paris.+}" in out
    assert [one["verdict"] for one in _json(capsys, "models", "diff", second.ref, first.ref)["differing"]] == [
        "learned"
    ]


def test_diff_needs_versions_that_were_examined(home, capsys):
    first, second = add_version(home), add_version(home)
    assert main(["models", "diff", first.ref, second.ref]) == 4
    assert "has not asked" in capsys.readouterr().err


def test_promote_rollback_pin_and_unpin_move_the_champion(home, capsys):
    first, second = add_version(home), add_version(home)
    registry = Registry(home)
    assert _json(capsys, "models", "promote", first.ref) == {"champion": first.ref, "before": None}
    assert _json(capsys, "models", "promote", "bot@latest")["before"] == first.ref
    assert _json(capsys, "models", "rollback", "bot") == {"champion": first.ref, "before": second.ref}
    assert main(["models", "pin", "bot"]) == 0
    assert main(["models", "promote", second.ref]) == 1
    assert "pinned" in capsys.readouterr().err
    assert "pinned" in _json(capsys, "models", "ls")[1]["aliases"]
    assert main(["models", "unpin", "bot"]) == 0
    assert main(["models", "promote", second.ref]) == 0
    assert registry.aliases("bot")["champion"] == second.id


def test_promote_needs_a_version_and_rollback_something_to_go_back_to(home, capsys):
    first = add_version(home)
    assert main(["models", "promote", "bot"]) == 2
    assert "names no version" in capsys.readouterr().err
    main(["models", "promote", first.ref])
    assert main(["models", "rollback", "bot"]) == 1
    assert main(["models", "rollback", "nobody"]) == 4


def test_export_copies_whole_and_never_overwrites(home, capsys, tmp_path):
    version = add_version(home)
    assert main(["models", "export", version.ref, "out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_text() == "weights"
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    assert main(["models", "export", version.ref, "out"]) == 1
    assert "nothing is ever written over" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"


def test_a_damaged_version_is_not_exported(home, capsys, tmp_path):
    version = add_version(home)
    (version.path / "model.safetensors").chmod(0o644)
    (version.path / "model.safetensors").write_text("altered")
    assert main(["models", "export", version.ref, "out"]) == 1
    assert not (tmp_path / "out").exists()


def test_rm_deletes_what_nothing_points_at(home, capsys):
    first, second = add_version(home), add_version(home)
    main(["models", "promote", second.ref])
    assert main(["models", "rm", first.ref]) == 2
    assert main(["models", "rm", second.ref, "--yes"]) == 1
    assert main(["models", "rm", "bot", "--yes"]) == 2
    assert _json(capsys, "models", "rm", first.ref, "--yes")["removed"] == [first.ref]
    assert [row["ref"] for row in _json(capsys, "models", "ls")] == [second.ref]


def test_pins_are_added_listed_and_removed(home, capsys):
    pin = _json(capsys, "pins", "add", "Where is the office?", "In Oslo.", "--name", "bot")
    assert _json(capsys, "pins", "ls", "--name", "bot")[0]["answer"] == "In Oslo."
    assert main(["pins", "ls", "--name", "bot"]) == 0
    assert "Where is the office?  In Oslo." in capsys.readouterr().out
    assert main(["pins", "rm", str(pin["id"]), "--name", "bot"]) == 2
    assert main(["pins", "rm", str(pin["id"]), "--name", "bot", "--yes"]) == 0
    assert main(["pins", "rm", "99", "--name", "bot", "--yes"]) == 4
    assert _json(capsys, "pins", "ls", "--name", "bot") == []


@pytest.mark.parametrize("source", ["r.yaml", "train.json"])
def test_data_is_previewed_and_checked_from_recipes_and_files(source, home, capsys):
    data = _json(capsys, "data", "preview", source, "--count", "1")
    assert (len(data["examples"]), data["num_examples"]) == (1, 3)
    assert main(["data", "preview", source]) == 0
    assert "train.json:1\nuser: question 0?\nassistant: answer 0" in capsys.readouterr().out
    checked = _json(capsys, "data", "check", source)
    assert checked["examples"] == 3
    assert checked["sources"][0]["formats"] == {"query_retrieved": 3}
    assert (checked.get("new"), "new" in checked) == ((3, True) if source == "r.yaml" else (None, False))


def test_settings_beside_a_data_file_are_refused_not_ignored(home, capsys):
    assert main(["data", "check", "train.json", "train.epochs=5"]) == 2
    assert "train.json is a data file" in capsys.readouterr().err


def test_data_that_is_wrong_is_named_with_its_line(home, capsys, tmp_path):
    (tmp_path / "train.json").write_text('[{"query": "a", "retrieved": "b"},\n{"query": "c"}]')
    assert main(["data", "check", "r.yaml"]) == 1
    assert "train.json:2" in capsys.readouterr().err


def test_forget_deletes_the_conversation_and_what_would_be_replayed(home, capsys):
    database = Database(home).connect()
    ConversationStore(database).record("req-1", "bot", "bot@x", [{"role": "user", "content": "q"}], "a")
    example = {"id": "req-1", "source": "conversations", "messages": [{"role": "user", "content": "q"}]}
    AcceptedExamples(database).add("bot", "20261121_000000", [example])
    assert main(["data", "forget", "req-1"]) == 2
    nowhere_else = {"runs": [], "jobs": [], "files": [], "memories": [], "tainted": []}
    done = {"forgotten": "req-1", "accepted_examples_deleted": 1} | nowhere_else
    assert _json(capsys, "data", "forget", "req-1", "--yes") == done
    assert main(["data", "forget", "req-1", "--yes"]) == 4
    assert len(AcceptedExamples(database).digests("bot")) == 0


def test_config_shows_the_resolved_recipe_and_who_set_what(home, capsys, monkeypatch):
    monkeypatch.setenv("NIGHTSCHOOL_TRAIN__EPOCHS", "9")
    assert main(["config", "show", "r.yaml", "lr=1e-4", "--origin"]) == 0
    out = capsys.readouterr().out
    assert "r.yaml:1" in out
    assert "NIGHTSCHOOL_TRAIN__EPOCHS" in out
    data = _json(capsys, "config", "show", "r.yaml", "lr=1e-4", "--origin")
    assert data["recipe"]["train"]["epochs"] == 9
    assert data["origins"]["train.learning_rate"] == {"kind": "override", "where": "lr=1e-4"}


def test_what_config_show_prints_is_a_recipe_that_says_the_same(home, capsys, tmp_path):
    assert main(["config", "show", "r.yaml"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert _json(capsys, "config", "show", "again.yaml") == _json(capsys, "config", "show", "r.yaml")


def test_the_schema_is_json_without_asking(home, capsys):
    assert main(["config", "schema"]) == 0
    assert "learning_rate" in json.dumps(json.loads(capsys.readouterr().out))


def test_the_schedule_lists_cycles_and_whether_somebody_keeps_it(home, capsys):
    ledger = Ledger(Database(home).connect())
    due = datetime.now(UTC) - timedelta(hours=2)
    ledger.finish(ledger.begin("bot", due, "start"), "refused", "forgetting", run_id="bot-20261121_000000")
    data = _json(capsys, "schedule", "ls")
    assert data["schedules"] == {"bot": {"running": False, "paused": False}}
    assert [(row["trigger"], row["outcome"]) for row in data["cycles"]] == [("start", "refused")]
    with lock(schedule_lock_path(home, "bot"), "x"):
        assert _json(capsys, "schedule", "ls", "bot")["schedules"]["bot"]["running"]
    assert main(["schedule", "ls"]) == 0
    assert "bot: no scheduler is running" in capsys.readouterr().out


def test_next_keeps_the_rhythm_of_the_last_cycle(home, capsys):
    ledger = Ledger(Database(home).connect())
    due = datetime.now(UTC) - timedelta(hours=2)
    ledger.finish(ledger.begin("bot", due, "start"), "promoted")
    data = _json(capsys, "schedule", "next", "r.yaml", "--count", "2")
    assert data["due_at"] == [(due + timedelta(hours=12 * k)).isoformat() for k in (1, 2)]
    assert main(["schedule", "next", "r.yaml"]) == 0
    assert "a cycle begins at once" in capsys.readouterr().out


def test_pause_and_resume_are_seen_by_ls(home, capsys):
    Ledger(Database(home).connect()).begin("bot", datetime.now(UTC), "start")
    assert main(["schedule", "pause", "bot"]) == 0
    assert _json(capsys, "schedule", "ls")["schedules"]["bot"]["paused"]
    assert main(["schedule", "resume", "bot"]) == 0
    assert not _json(capsys, "schedule", "ls")["schedules"]["bot"]["paused"]


def test_a_second_scheduler_is_refused(home, capsys):
    with lock(schedule_lock_path(home, "bot"), "the schedule of bot"):
        assert main(["schedule", "run", "r.yaml"]) == 1
    assert "holds the schedule of bot" in capsys.readouterr().err


def test_a_cron_expression_that_is_none_is_refused(home, capsys):
    assert main(["schedule", "next", "r.yaml", "schedule.cron=every night"]) == 2
    assert "every night" in capsys.readouterr().err


def test_runs_of_the_registry_are_left_alone_by_runs_rm(home, capsys):
    run = make_run(home)
    version = add_version(home, run_id=run.id)
    assert main(["runs", "rm", run.id, "--yes"]) == 0
    assert main(["models", "promote", version.ref]) == 0


def test_aliases_of_ones_own_are_set_moved_and_taken_away(home, capsys):
    registry = Registry(home)
    versions = [add_version(home, text=text) for text in ("one", "two")]
    registry.promote("bot", versions[0].id, by="test")
    assert _json(capsys, "models", "alias", versions[0].ref, "stable")["ref"] == versions[0].ref
    assert registry.resolve("bot@stable").id == versions[0].id
    assert main(["models", "alias", versions[-1].ref, "stable"]) == 0
    assert capsys.readouterr().out == f"bot@stable is {versions[-1].ref}.\n"
    assert main(["models", "alias", "bot", "champion"]) == 1
    assert "cannot be set by hand" in capsys.readouterr().err
    assert main(["models", "alias", "bot", "stable", "--rm"]) == 0
    assert "stable" not in registry.aliases("bot")
    assert main(["models", "alias", "bot", "stable", "--rm"]) == 1 + 3
    assert "has no alias 'stable'" in capsys.readouterr().err


def test_a_model_from_elsewhere_is_added_and_added_once(home, capsys, tmp_path):
    save_version_folder(lively_model(), byte_tokenizer(), tmp_path / "there")
    first = _json(capsys, "models", "add", "mine", "./there")
    assert first["added"]
    assert first["champion"] == first["ref"]
    assert main(["models", "add", "mine", str(tmp_path / "there")]) == 0
    assert f"{first['ref']} was added from these files before" in capsys.readouterr().out
    assert [row["method"] for row in _json(capsys, "models", "ls", "mine")] == ["import"]
    assert main(["models", "add", "Mine!", "./there"]) == 2
    assert main(["models", "add", "other", "./nowhere"]) == 4
    assert "Name a folder, a GGUF file or a hub id." in capsys.readouterr().err


DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


def test_a_damaged_version_is_named_and_hides_no_other(home, capsys):
    whole, nested, unexamined = add_version(home, heldout_loss=1.25), add_version(home), add_version(home)
    damage(nested.path / "nightschool.json", DEEP)
    Registry(home).save_report("bot", unexamined.id, {})
    damage(Registry(home).report_path("bot", unexamined.id), DEEP)
    rows = {row["ref"]: row for row in _json(capsys, "models", "ls")}
    assert list(rows) == [unexamined.ref, nested.ref, whole.ref]
    assert rows[whole.ref]["kind"] == "model"
    assert rows[whole.ref]["damaged"] is None
    for version, file in ((nested, "nightschool.json"), (unexamined, f"reports/{unexamined.id}.json")):
        assert rows[version.ref]["kind"] == "damaged"
        assert f"{file} is not JSON (it is nested too deeply)" in rows[version.ref]["damaged"]
    assert main(["models", "ls"]) == 0
    printed = capsys.readouterr()
    assert whole.ref in printed.out
    assert f"{nested.ref}: {nested.path / 'nightschool.json'} is not JSON" in printed.err


def test_what_shows_a_damaged_version_alone_says_which_file_and_what_to_do(home, capsys):
    version = add_version(home)
    damage(version.path / "nightschool.json", DEEP)
    assert main(["models", "show", version.ref]) == 1
    said = capsys.readouterr().err
    assert "nightschool.json" in said
    assert "estore" in said
    assert "mistake of nightschool" not in said


def test_a_name_whose_aliases_are_damaged_hides_no_other(home, capsys):
    add_version(home)
    other = add_version(home, name="other")
    damage(home.models / "bot" / "aliases.json", DEEP)
    assert main(["models", "ls"]) == 0
    printed = capsys.readouterr()
    assert other.ref in printed.out
    assert f"{home.models / 'bot' / 'aliases.json'} is not JSON" in printed.err


def damage(path, content):
    path.chmod(0o644)
    path.write_text(content)


OSC_52 = "\x1b]52;c;ZXZpbA==\x07"


def test_escapes_in_data_and_errors_are_written_out(home, capsys, tmp_path):
    row = {"query": f"Hi{OSC_52}\u202e?", "retrieved": f"line one\n\tline two\x9b2J{OSC_52}"}
    (tmp_path / "hostile.json").write_text(json.dumps([row]))
    assert main(["data", "preview", "hostile.json"]) == 0
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(printed)
    assert "\\x1b]52;c;ZXZpbA==\\x07\\u202e?" in printed
    assert "line one\n\tline two\\x9b2J" in printed
    (tmp_path / "wrong.json").write_text(json.dumps([{f"a{OSC_52}": 1}]))
    assert main(["data", "check", "wrong.json"]) == 1
    said = capsys.readouterr().err
    assert "\\x1b]52" in said
    assert "\x1b" not in said
