"""train, plan, schedule run and serve: what they hand on, and what they exit with."""

import errno
import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nightschool.cli import serve as serve_module
from nightschool.cli import train as train_module
from nightschool.cli.main import main
from nightschool.cli.reference import reference
from nightschool.config.load import load_recipe
from nightschool.errors import Interrupted, Locked
from nightschool.feedback.selection import Selection
from nightschool.feedback.selection_files import write_selection
from nightschool.jobs import detached
from nightschool.jobs.cycle import cycle_lock_path
from nightschool.jobs.outcome import CycleRecord, CycleResult
from nightschool.models.export import save_version_folder
from nightschool.server.settings import ServerSettings
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.locks import lock, lock_to_hand_over
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.work.processes import command
from tests.support.cli_home import add_checkpoint
from tests.support.engine_setups import lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

RECIPE = "name: bot\nbase: new:tiny\ndata: [{path: train.json}]\ntrain: {epochs: 3}\n"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "train.json").write_text(json.dumps([{"query": "q?", "retrieved": "a"}]))
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def cycles(monkeypatch):
    """Cycles that do nothing but remember what they were asked, and end as `result` says."""
    asked = SimpleNamespace(result=CycleResult("promoted", "passed", run_id="r", candidate="bot@v"), calls=[])

    def run_cycle(home, recipe, *, trigger, root, around):
        asked.calls.append(("run", recipe, trigger, root))
        if around.on_line:
            around.on_line("step 1/2 loss 1.0")
        around.say("Run r")
        return asked.result

    def continue_cycle(home, run_id, *, resume, around):
        asked.calls.append(("continue", run_id, resume))
        return asked.result

    monkeypatch.setattr(train_module, "run_cycle", run_cycle)
    monkeypatch.setattr(train_module, "continue_cycle", continue_cycle)
    return asked


def _begun(home):
    """A run that a cycle of r.yaml began."""
    run = RunStore(home).create(load_recipe(Path("r.yaml"), env={}).recipe.as_plain(), name="bot")
    CycleRecord("manual", str(Path.cwd()), "new:tiny", None, "data", 1).write(run)
    write_selection(run.path, Selection([], [], []))
    return run


@pytest.mark.parametrize(
    ("outcome", "exit_code"),
    [("promoted", 0), ("published", 0), ("refused", 3), ("interrupted", 75), ("failed", 2)],
)
def test_train_exits_as_its_cycle_ended(outcome, exit_code, home, cycles, capsys):
    cycles.result = CycleResult(outcome, "so it was", run_id="bot-1", candidate="bot@v", failed_exit_code=2)
    assert main(["train", "r.yaml", "train.epochs=5"]) == exit_code
    out = capsys.readouterr().out
    assert f"{outcome}: so it was" in out
    assert "step 1/2 loss 1.0\n[Cycle] Run r\n" in out
    assert "see nightschool models report bot@v" in out
    assert ("train --resume bot-1" in out) == (outcome == "interrupted")
    kind, recipe, trigger, root = cycles.calls[0]
    assert (kind, recipe.train.epochs, trigger, root) == ("run", 5, "manual", Path.cwd())


def test_train_with_json_has_stdout_for_the_result(home, cycles, capsys):
    assert main(["train", "r.yaml", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["outcome"] == "promoted"
    assert "step 1/2" in captured.err
    assert main(["train", "r.yaml", "-q"]) == 0
    assert capsys.readouterr().out == "bot@v\n"


def test_train_needs_something_to_train(home, cycles, capsys):
    assert main(["train"]) == 2
    assert main(["train", "nowhere.yaml"]) == 4
    assert main(["train", "r.yaml", "train.epoch=5"]) == 2
    assert "train.epochs" in capsys.readouterr().err
    assert cycles.calls == []


def test_resume_takes_a_run_or_a_checkpoint(home, cycles, capsys):
    run = _begun(home)
    path = add_checkpoint(run, 4)
    for wanted in (run.id, path.name, f"{run.id}/{path.name}", f"{run.id}/4", "4", str(path)):
        assert main(["train", "--resume", wanted]) == 0
    assert main(["train", "r.yaml", "--resume", run.id]) == 0
    assert cycles.calls == [("continue", run.id, "latest"), *[("continue", run.id, path.name)] * 5, cycles.calls[0]]
    capsys.readouterr()
    assert main(["train", "--resume", "bot-20200101_000000"]) == 4
    assert f"neither a run nor a checkpoint in {home.runs}. Runs: {run.id}" in capsys.readouterr().err


def test_resume_with_another_recipe_is_refused_with_both_values(home, cycles, capsys):
    run = _begun(home)
    assert main(["train", "r.yaml", "train.learning_rate=0.5", "--resume", run.id]) == 1
    assert "train.learning_rate is 2e-06 there and 0.5 here" in capsys.readouterr().err
    assert main(["train", "train.learning_rate=0.5", "--resume", run.id]) == 2
    assert "keeps its recipe but for its length, and 'train.learning_rate=0.5' is none" in capsys.readouterr().err
    assert cycles.calls == []


@pytest.mark.parametrize("words", [["train.epochs=9"], ["epochs=9"], ["r.yaml", "train.epochs=9"]])
def test_resume_with_another_length_makes_a_run_of_its_own(words, home, cycles, capsys):
    run = _begun(home)
    path = add_checkpoint(run, 4)
    before = run.recipe_path.read_bytes()
    assert main(["train", *words, "--resume", run.id]) == 0
    [(_, made, resume)] = cycles.calls
    assert (made != run.id, resume) == (True, path.name)
    new = RunStore(home).get(made)
    assert (new.recipe()["train"]["epochs"], run.recipe_path.read_bytes()) == (9, before)
    assert checkpoints.get(new, path.name).verify().facts == checkpoints.get(run, path.name).verify().facts
    assert CycleRecord.read(new).trigger == "resume"


def test_another_length_than_one_that_was_reached_or_of_a_run_that_saved_nothing_is_refused(home, cycles, capsys):
    run = _begun(home)
    assert main(["train", "train.epochs=9", "--resume", run.id]) == 4
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    add_checkpoint(run, 4)
    assert main(["train", "train.epochs=1", "--resume", run.id]) == 2
    assert (
        "train.epochs is 1, and checkpoint-epoch1-step4-files1 has reached epoch 1 already" in capsys.readouterr().err
    )
    assert main(["train", "train.max_steps=4", "--resume", run.id]) == 2
    assert "has reached step 4 already" in capsys.readouterr().err
    assert [one.id for one in RunStore(home).ls()] == [run.id]


def test_detach_prints_the_run_and_leaves_a_process_with_it(home, monkeypatch, capsys):
    started = []

    def start_process(arguments, *, log, directory, keep_open):
        started.append((arguments, log, directory))
        with pytest.raises(Locked), lock(cycle_lock_path(home, "bot"), "a cycle of bot"):
            pass
        return SimpleNamespace(pid=4711, returncode=None)

    monkeypatch.setattr(train_module, "start_process", start_process)
    assert main(["train", "r.yaml", "--detach", "-q"]) == 0
    run = RunStore(home).ls()[0]
    assert capsys.readouterr().out == f"{run.id}\n"
    arguments, log, directory = started[0]
    assert arguments == command("cycle", "--home", str(home.path), "--run", run.id, "--lock", arguments[-1])
    assert (log, directory) == (run.log_path, Path.cwd())


def test_nobody_gets_between_who_begins_a_cycle_and_who_goes_on_with_it(home, tmp_path):
    path, ready, go_on = cycle_lock_path(home, "bot"), tmp_path / "ready", tmp_path / "go_on"
    child = (
        "import pathlib, sys, time\n"
        "from nightschool.store.locks import taken_over\n"
        "with taken_over(int(sys.argv[1])):\n"
        "    pathlib.Path(sys.argv[2]).touch()\n"
        "    while not pathlib.Path(sys.argv[3]).exists(): time.sleep(0.01)\n"
    )
    with lock_to_hand_over(path, "a cycle of bot") as held:
        words = [sys.executable, "-c", child, str(held), str(ready), str(go_on)]
        process = subprocess.Popen(words, pass_fds=[held])
    # Also before it has said anything.
    with pytest.raises(Locked), lock(path, "a cycle of bot"):
        pass
    while not ready.exists():
        assert process.poll() is None
    with pytest.raises(Locked, match=f"pid {process.pid}"), lock(path, "a cycle of bot"):
        pass
    go_on.touch()
    assert process.wait(20) == 0
    with lock(path, "a cycle of bot"):
        pass


def test_a_detached_run_that_cannot_begin_says_why(home, monkeypatch, capsys):
    run = _begun(home)

    def refuse(*_, **__):
        raise Locked("Another process (pid 1) holds a cycle of bot.")

    monkeypatch.setattr(detached, "continue_cycle", refuse)
    assert detached.main(["--home", str(home.path), "--run", run.id]) == 1
    assert (run.status.state, run.status.error) == ("cancelled", "Another process (pid 1) holds a cycle of bot.")


def test_a_detached_run_whose_process_cannot_start_has_failed(home, monkeypatch, capsys):
    def start_process(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(train_module, "start_process", start_process)
    assert main(["train", "r.yaml", "--detach"]) == 1
    status = RunStore(home).ls()[0].status
    assert status.state == "failed"
    assert "Cannot allocate memory" in status.error


@pytest.mark.parametrize("outcome", ["promoted", "refused"])
def test_the_detached_process_does_the_rest_and_exits_as_it_ended(outcome, home, monkeypatch, capsys):
    run = _begun(home)
    result = CycleResult(outcome, "so it was", run_id=run.id)
    monkeypatch.setattr(detached, "continue_cycle", lambda home, run_id, **_: result)
    assert detached.main(["--home", str(home.path), "--run", run.id]) == result.exit_code
    assert f"{outcome}: so it was" in capsys.readouterr().out


def test_the_detached_process_says_what_stopped_it(home, monkeypatch, capsys):
    def stopped(home, run_id, **_):
        raise Interrupted("by a signal.")

    monkeypatch.setattr(detached, "continue_cycle", stopped)
    run = _begun(home)
    assert detached.main(["--home", str(home.path), "--run", run.id]) == 75
    assert run.status.state == "interrupted"
    assert capsys.readouterr().err == "error: by a signal.\n"


def test_a_dry_run_is_the_plan_and_trains_nothing(home, cycles, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(train_module, "plan", lambda recipe, *overrides: planned.append((recipe, overrides)) or 0)
    assert main(["train", "r.yaml", "train.epochs=5", "-n"]) == 0
    assert planned == [(Path("r.yaml"), ("train.epochs=5",))]
    assert main(["train", "-n", "--resume", "x"]) == 2
    assert cycles.calls == []


def test_serve_hands_its_options_to_the_server(home, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(
        "nightschool.server.run.serve",
        lambda home, name, settings, *, engine: served.append((name, settings, engine)),
    )
    words = ["serve", "bot", "--port", "0", "--model-check-interval", "10m", "--record-conversations"]
    assert main([*words, "--num-rows", "4"]) == 0
    name, settings, engine = served[0]
    assert (name, settings.port, settings.model_check_interval, settings.record_conversations) == (
        ["bot"],
        0,
        600.0,
        True,
    )
    assert (engine["num_rows"], engine["queue_limit"]) == (4, 256)
    assert "Conversations are kept" in capsys.readouterr().err


def test_serve_adds_a_model_from_elsewhere_first_and_says_so(home, monkeypatch, capsys, tmp_path):
    served = []
    monkeypatch.setattr("nightschool.server.run.serve", lambda home, name, settings, *, engine: served.append(name))
    save_version_folder(lively_model(), byte_tokenizer(), tmp_path / "My Model")
    for words in (["serve", "./My Model"], ["serve", str(tmp_path / "My Model"), "--name", "mine"]):
        assert main(words) == 0
    assert served == [["my-model"], ["mine"]]
    assert "Added my-model@" in capsys.readouterr().err
    (champion,) = Registry(home).versions("my-model")
    assert Registry(home).resolve("my-model") == champion
    assert main(["serve", "bot", "--name", "mine"]) == 2
    assert main(["serve", "./My Model", "serve.record_conversations=true"]) == 2


def test_serve_has_an_option_for_each_bound_of_the_server(home, monkeypatch):
    served = []
    monkeypatch.setattr("nightschool.server.run.serve", lambda home, name, settings, *, engine: served.append(settings))
    words = "--allowed-hosts Proxy.example --allowed-hosts b.example --max-body-bytes 5000 --max-new-tokens-limit 64"
    words += " --max-connections 50 --idle-timeout-seconds 5"
    words += " --max-connections-per-address 20 --write-timeout-seconds 4"
    assert main(["serve", "bot", *words.split(), "--request-burst", "3", "--drain-seconds", "2.5"]) == 0
    (settings,) = served
    assert settings.allowed_hosts == ("proxy.example", "b.example")
    assert (settings.max_body_bytes, settings.max_new_tokens_limit) == (5000, 64)
    assert (settings.request_burst, settings.drain_seconds) == (3, 2.5)
    assert (settings.max_connections, settings.idle_timeout_seconds) == (50, 5.0)
    assert (settings.max_connections_per_address, settings.write_timeout_seconds) == (20, 4.0)
    parameters = set(inspect.signature(serve_module.serve).parameters) - {"name", "overrides"}
    # The time for a body is no matter of taste, keys come from a file, never from a command line, and jobs are set by
    # variables and requests.
    missing = set(ServerSettings.model_fields) - parameters - {"api_keys", "body_timeout_seconds", "training_service"}
    assert not missing, f"no option sets {missing}"


def test_serve_takes_what_a_recipe_wishes_unless_an_option_says_otherwise(home, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(
        "nightschool.server.run.serve", lambda home, name, settings, *, engine: served.append((name, settings))
    )
    recipe = Path("wishes.yaml")
    recipe.write_text(
        "name: wisher\nbase: new:tiny\ndata: [{path: a.json}]\n"
        "serve: {record_conversations: true, model_check_interval: 5m}\n"
    )
    assert main(["serve", "wishes.yaml", "--port", "0"]) == 0
    assert main(["serve", "wishes.yaml", "serve.record_conversations=false", "--model-check-interval", "7"]) == 0
    assert [(name, one.record_conversations, one.model_check_interval) for name, one in served] == [
        (["wisher"], True, 300.0),
        (["wisher"], False, 7.0),
    ]
    assert main(["serve", "wisher", "serve.record_conversations=true"]) == 2
    assert "is a setting of a recipe" in capsys.readouterr().err


def test_names_that_were_translated_are_said(home, capsys):
    Path("r.yaml").write_text("base: new:tiny\ndata: [{path: a.json}]\n")
    assert main(["schedule", "next", "r.yaml", "interval_hours=12"]) == 0
    assert "interval_hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--model-check-interval", "soon"], "--model-check-interval: 'soon' is not a duration"),
        (["--model-check-interval", "0"], "--model-check-interval 0"),
        (["--log-level", "loud"], "--log-level loud"),
        (["--max-body-bytes", "1"], "--max-body-bytes 1"),
        (["--request-burst", "0"], "--request-burst 0"),
        (["--host", "0.0.0.0"], "there is no API key"),
    ],
)
def test_serve_refuses_options_that_cannot_be(words, message, home, monkeypatch, capsys):
    monkeypatch.delenv("NIGHTSCHOOL_API_KEY", raising=False)
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_said_with_a_remedy(home, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"Port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_the_reference_in_the_docs_is_up_to_date():
    page = ROOT / "docs" / "cli.md"
    assert page.read_text("utf-8") == reference(), "run python -m nightschool.cli.reference docs/cli.md"


@pytest.mark.parametrize(
    ("terminal", "no_colour", "words", "wish"),
    [(True, None, [], "1"), (False, None, [], None), (True, "1", [], None), (True, None, ["--json"], None)],
)
def test_a_child_is_told_of_colour_only_where_a_person_looks(
    terminal, no_colour, words, wish, home, cycles, monkeypatch
):
    # Set and deleted, so that monkeypatch puts back what stood there before.
    for name, value in (("FORCE_COLOR", None), ("NO_COLOR", no_colour)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["train", "r.yaml", *words]) == 0
    assert os.environ.get("FORCE_COLOR") == wish
