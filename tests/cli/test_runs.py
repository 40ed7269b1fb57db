"""runs, checkpoints and top."""

import json
import subprocess
import sys
import threading
import time

import pytest

from nightschool.cli.formatting import duration, sparkline
from nightschool.cli.main import main
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from tests.support.cli_home import add_checkpoint, make_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").ensure()


def _json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_newest_first_with_their_figures(home, capsys):
    make_run(home)
    make_run(home, name="other", minutes=5, state="failed", error="NaN")
    rows = _json(capsys, "runs", "ls")
    assert [(row["run_id"], row["state"]) for row in rows] == [
        ("other-20261121_060500", "failed"),
        ("bot-20261121_060000", "completed"),
    ]
    assert rows[1]["loss"] == pytest.approx(1.9)
    assert rows[1]["heldout_loss"] == pytest.approx(2.0)
    assert main(["runs", "ls", "--name", "bot", "-q"]) == 0
    assert capsys.readouterr().out == "bot-20261121_060000\n"


def test_a_run_whose_process_died_is_shown_as_interrupted(home, capsys):
    run = make_run(home)
    run.update_status(state="running", pid=2**22 + 1)
    assert _json(capsys, "runs", "ls")[0]["state"] == "interrupted"


def test_show_has_figures_checkpoints_and_the_recipe(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    data = _json(capsys, "runs", "show")
    assert data["recipe"]["name"] == "bot"
    assert data["checkpoints"] == ["checkpoint-epoch1-step4-files1"]
    assert main(["runs", "show", run.id]) == 0
    out = capsys.readouterr().out
    assert "loss curve" in out
    assert "best_heldout_loss 2" in out


def test_show_draws_what_spot_checks_found_and_marks_what_was_published(home, capsys):
    run = make_run(home)
    with run.metrics_path.open("a") as file:
        for number in range(1, 31):
            file.write(json.dumps({"step": 100 + number, "learned": number / 30, "drift": number / 100}) + "\n")
    run.events.write("published", step=104)
    data = _json(capsys, "runs", "show")
    assert data["spot_checks"][3] == {"step": 104, "learned": 4 / 30, "drift": 0.04}
    assert main(["runs", "show"]) == 0
    out = capsys.readouterr().out
    assert "learned, % (up), against drift, nats a token (right), from step 101 to 130" in out
    assert any(0x2800 < ord(letter) < 0x2900 for letter in out)
    lines = [line.split() for line in out.splitlines() if line.startswith("1")]
    assert ["104", "13%", "0.0400", "published"] in lines
    assert lines[-1] == ["130", "100%", "0.3000"]
    assert len(lines) <= 13, "a long run shows some of its steps"


def test_unknown_runs_exit_4_and_say_what_exists(home, capsys):
    make_run(home)
    assert main(["runs", "show", "bot-20200101_000000"]) == 4
    assert "bot-20261121_060000" in capsys.readouterr().err
    assert main(["runs", "show", "../../etc"]) == 2


def test_logs_are_plain_where_nobody_looks(home, capsys):
    make_run(home)
    assert main(["runs", "logs", "-f"]) == 0
    assert capsys.readouterr().out == "preparing\nstep 12/12\n"


def test_each_process_of_a_run_has_a_log(home, capsys):
    run = make_run(home)
    (run.path / "log-rank1.txt").write_text("the second one\n")
    assert main(["runs", "logs", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "the second one\n"
    assert main(["runs", "logs", "--rank", "2"]) == 4


def test_watch_follows_until_the_run_ends_and_exits_as_it_does(home, capsys):
    run = make_run(home)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        run.update_status(state="running", pid=child.pid, exit_code=None)

        def end():
            time.sleep(0.3)
            with run.metrics_path.open("a") as file:
                file.write(
                    json.dumps(
                        {"step": 13, "loss": 1.0, "tokens_per_second": 1.0, "learning_rate": 1e-3, "seconds": 13.0}
                    )
                    + "\n"
                )
            run.update_status(state="failed", exit_code=75, error="stopped")

        threading.Thread(target=end).start()
        assert main(["runs", "watch", run.id]) == 75
    finally:
        child.kill()
        child.wait()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert lines[0].startswith("step 1/12  loss 3.0000  100 tok/s")
    assert lines[12].startswith("step 13/12  loss 1.0000")
    assert lines[13] == f"{run.id}: failed: stopped"


def test_watch_with_json_prints_one_row_a_line(home, capsys):
    make_run(home)
    assert main(["runs", "watch", "--json"]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == list(range(1, 13))


def test_stop_asks_only_a_process_that_is_ours(home, capsys):
    run = make_run(home)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        run.update_status(state="running", pid=stranger.pid, pid_created_at=1.0)  # its number was given away
        assert main(["runs", "stop", run.id]) == 1
        assert "No process trains the run" in capsys.readouterr().err
        assert stranger.poll() is None
        run.update_status(pid=ours.pid)
        assert _json(capsys, "runs", "stop")["pid"] == ours.pid
        assert ours.wait(60) == -15
    finally:
        for process in (stranger, ours):
            process.kill()
            process.wait()


def test_compare_shows_what_differs_and_nothing_else(home, capsys):
    first, second = make_run(home), make_run(home, minutes=1, epochs=7)
    data = _json(capsys, "runs", "compare", first.id, second.id)
    assert data["settings"] == {"train.epochs": [3, 7]}
    assert main(["runs", "compare", first.id, second.id]) == 0
    assert "train.epochs" in capsys.readouterr().out


def test_more_than_two_runs_are_compared_with_the_figures_of_pretraining(home, capsys):
    runs = [make_run(home, minutes=minute, epochs=epochs) for minute, epochs in enumerate((3, 7, 3))]
    _pretraining_row(runs[1])
    data = _json(capsys, "runs", "compare", *(run.id for run in runs))
    assert data["settings"] == {"train.epochs": [3, 7, 3]}
    assert data["figures"]["bits_per_byte"] == [None, 0.91, None]
    assert main(["runs", "compare", *(run.id for run in runs)]) == 0
    out = capsys.readouterr().out
    assert "heldout_perplexity" in out
    assert "mfu" in out


def _pretraining_row(run):
    row = {"step": 13, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 0.91, "mfu": 0.424, "eta_seconds": 75.0}
    row |= {"heldout_loss": 2.1, "heldout_perplexity": 8.2, "heldout_bits_per_byte": 0.95, "tokens_per_second": 9.0}
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_watch_and_show_have_the_figures_of_pretraining(home, capsys):
    run = make_run(home)
    _pretraining_row(run)
    assert main(["runs", "watch"]) == 0
    assert capsys.readouterr().out.splitlines()[12] == (
        "step 13/12  loss 2.0000  held-out 2.1000  perplexity 7.389  0.910 bits/byte  held-out 0.950 bits/byte  "
        "9 tok/s  MFU 42.4%  eta 1:15"
    )
    assert main(["runs", "show"]) == 0
    assert "heldout_bits_per_byte 0.95" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": 13}', '{"step": 13, "loss": null}', "\x00\x00"])
def test_rows_that_are_broken_stop_nobody_from_looking(line, home, capsys):
    run = make_run(home)
    with run.metrics_path.open("a") as file:
        file.write(line + "\n")
    for words in (["ls"], ["show"], ["watch"], ["compare", run.id, run.id]):
        assert main(["runs", *words]) == 0, words
    assert main(["checkpoints", "plot"]) == 0


def test_rm_asks_and_without_a_terminal_needs_yes(home, capsys):
    run = make_run(home)
    assert main(["runs", "rm", run.id]) == 2
    assert "Add --yes" in capsys.readouterr().err
    assert RunStore(home).ls()
    assert main(["runs", "rm", run.id, "--yes"]) == 0
    assert RunStore(home).ls() == []


@pytest.mark.parametrize(("typed", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_rm_on_a_terminal_does_what_the_person_says(typed, left, home, monkeypatch):
    run = make_run(home)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdin.readline", lambda: typed)
    assert main(["runs", "rm", run.id]) == (0 if left == 0 else 2)
    assert len(RunStore(home).ls()) == left


def test_a_sparkline_has_the_newest_at_the_right_and_takes_any_values():
    assert sparkline([3, 2, 1]) == "█▅▁"
    assert sparkline([1.0] * 100) == "▁" * 40
    assert sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000), width=10)) == 10
    assert (duration(42), duration(187), duration(8100)) == ("0:42", "3:07", "2:15:00")
