"""The command line as a whole: help, options that hold everywhere, errors, exit codes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nightschool import __version__
from nightschool.cli import main as cli
from nightschool.cli.main import NOUNS, VERBS, main, split_global_options
from nightschool.errors import DiskFull, Interrupted

EVERY_VERB = [[verb] for verb in VERBS] + [[noun, verb] for noun, (_, verbs) in NOUNS.items() for verb in verbs]
TWO_STEPS = "import sys, nightschool.cli.main as m; code = m.main(sys.argv[1:]); print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
HEAVY = "heavy = {'torch', 'transformers', 'pydantic', 'sqlalchemy', 'numpy', 'fastapi'}; "


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    monkeypatch.delenv("NIGHTSCHOOL_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize("words", [["--help"], ["runs", "--help"], ["--version"], ["--json", "modelz"]])
def test_help_imports_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-c", HEAVY + TWO_STEPS, *words], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.splitlines()[-1].endswith(" []")


def test_no_verb_but_those_that_need_it_imports_torch():
    paths = {path.partition(":")[0] for path, _ in VERBS.values()} | {
        path.partition(":")[0] for _, verbs in NOUNS.values() for path, _ in verbs.values()
    }
    script = (
        "import importlib, sys\n"
        f"for name in {sorted(paths - {'nightschool.cli.demo'})!r}: importlib.import_module(name)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("words", [words for words in EVERY_VERB if words != ["demo"]], ids=" ".join)
def test_every_verb_of_the_table_exists_and_helps(words, capsys):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: nightschool {' '.join(words)}" in shown
    assert "Everywhere: --json, -q, -C DIR" in shown


def test_the_table_names_functions_with_a_docstring():
    for path, _ in [pair for _, verbs in NOUNS.values() for pair in verbs.values()]:
        module, _, function = path.partition(":")
        assert getattr(importlib.import_module(module), function).__doc__


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [(["models", "list"], 0), (["runs", "list"], 0), (["checkpoints", "list"], 4), (["checkpoints", "view", "x"], 4)],
)
def test_list_and_view_are_accepted_spellings(words, exit_code, here, capsys):
    assert main(words) == exit_code
    assert "no verb" not in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", [["--json", "runs", "ls"], ["runs", "--json", "ls"], ["runs", "ls", "--json"]])
def test_json_may_stand_anywhere_and_has_stdout_for_itself(words, here, capsys):
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("before", [True, False])
def test_c_works_as_if_started_there(before, here, capsys):
    (here / "sub").mkdir()
    (here / "sub" / "r.yaml").write_text("base: new:tiny\ndata: [{path: a.json}]\n")
    words = ["config", "validate", "r.yaml"]
    assert main(["-C", "sub", *words] if before else [*words, "-C", "sub"]) == 0
    assert "r.yaml is a valid recipe" in capsys.readouterr().out
    assert Path.cwd() == here


def test_c_decides_on_the_home_unless_the_environment_does(here, capsys, monkeypatch):
    (here / "sub").mkdir()
    assert main(["-C", "sub", "pins", "add", "Q?", "A."]) == 0
    assert (here / "sub" / ".nightschool" / "state.db").exists()
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(here / "other"))
    assert main(["-C", "sub", "pins", "ls", "-q"]) == 0
    assert "Nothing is pinned" not in capsys.readouterr().out
    assert main(["pins", "add", "Q?", "B.", "-q"]) == 0
    assert (here / "other" / "state.db").exists()


def test_several_c_are_read_from_where_the_one_before_led(here):
    (here / "a" / "b").mkdir(parents=True)
    rest, _, directory = split_global_options(["-C", str(here / "a"), "x", "-C", str(here / "a" / "b")])
    assert rest == ["x"]
    assert directory == here / "a" / "b"


@pytest.mark.parametrize("words", [["-C"], ["-C", "nowhere", "runs", "ls"]])
def test_c_without_a_folder_is_a_usage_error(words, here, capsys):
    assert main(words) == 2
    assert "error: -C needs a folder that exists" in capsys.readouterr().err


def test_after_two_dashes_options_are_text():
    rest, session, _ = split_global_options(["pins", "add", "--", "--json", "-q"])
    assert rest == ["pins", "add", "--", "--json", "-q"]
    assert not session.json
    assert not session.quiet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rns"], "nightschool has no verb 'rns'. Did you mean nightschool runs?"),
        (["runs", "lst"], "nightschool runs has no verb 'lst'. Did you mean nightschool runs ls?"),
        (["runs", "xyzzy"], "nightschool runs has no verb 'xyzzy'. There are ls, show, watch"),
        (["runs", "ls", "--bogus"], "Unknown option: --bogus"),
        (["pins", "add", "only a question"], "requires an argument"),
    ],
)
def test_what_makes_no_sense_exits_2_and_names_the_nearest(words, message, here, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_an_error_with_json_is_json(here, capsys):
    assert main(["models", "show", "nobody", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "not_found"
    assert "There is no version of 'nobody'" in error["message"]


def test_a_recipe_with_problems_exits_2_and_lists_all_of_them(here, capsys):
    (here / "r.yaml").write_text("bse: new:tiny\ntrain: {epoch: 3}\ndata: [{path: a.json}]\n")
    assert main(["config", "validate", "r.yaml"]) == 2
    err = capsys.readouterr().err
    assert "r.yaml:1" in err
    assert "r.yaml:2" in err
    assert main(["config", "validate", "r.yaml", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert {problem["key"] for problem in problems} >= {"bse", "train.epoch"}


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (Interrupted("stopped."), 75, "error: stopped."),
        (DiskFull("full."), 1, "error: full."),
        (FileNotFoundError(2, "No such file", "a.txt"), 4, "error: a.txt: No such file."),
        (OSError(28, "No space left on device", "b.txt"), 1, "There is no room on the disk for b.txt"),
        (
            OSError(30, "Read-only file system", "c.txt"),
            1,
            "c.txt cannot be written: its file system is read-only. Make",
        ),
        (
            PermissionError(13, "Permission denied", "d.txt"),
            1,
            "d.txt is closed to this user (Permission denied). Change",
        ),
        (KeyError("k"), 1, "This is a mistake of nightschool; NIGHTSCHOOL_DEBUG=1 shows where."),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_have_their_exit_codes_and_no_traceback(error, exit_code, message, here, capsys, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr("nightschool.cli.config.schema", fails)
    assert main(["config", "schema"]) == exit_code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_the_debug_variable_shows_the_traceback(here, capsys, monkeypatch):
    monkeypatch.setenv("NIGHTSCHOOL_DEBUG", "1")
    assert main(["models", "show", "nobody"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m nightschool.cli config schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_colour_needs_a_terminal_and_respects_no_color(monkeypatch):
    from nightschool.cli.output import bold

    assert bold("x") == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert bold("x") == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("x") == "x"


def test_the_session_of_one_command_does_not_leak_into_the_next(here, capsys):
    main(["runs", "ls", "--json"])
    assert cli.CURRENT.get() is None
