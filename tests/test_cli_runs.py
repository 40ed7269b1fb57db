"""runs, checkpoints and top."""

import json
import subprocess
import sys
import threading
import time

import pytest
from cli_home import add_checkpoint, make_run
from hypothesis import given
from hypothesis import strategies as st

from nightschool.cli.chart import chart
from nightschool.cli.main import main
from nightschool.cli.terms import duration, sparkline
from nightschool.store.home import Home
from nightschool.store.runs import RunStore


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


def test_unknown_runs_exit_4_and_say_what_exists(home, capsys):
    make_run(home)
    assert main(["runs", "show", "bot-20200101_000000"]) == 4
    assert "bot-20261121_060000" in capsys.readouterr().err
    assert main(["runs", "show", "../../etc"]) == 2


def test_logs_are_plain_where_nobody_looks(home, capsys):
    make_run(home)
    assert main(["runs", "logs", "-f"]) == 0
    assert capsys.readouterr().out == "preparing\nstep 12/12\n"


def test_watch_follows_until_the_run_ends_and_exits_as_it_does(home, capsys):
    run = make_run(home)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", run.id])
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
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", run.id])
    try:
        run.update_status(state="running", pid=stranger.pid)
        assert main(["runs", "stop", run.id]) == 1
        assert "No process trains the run" in capsys.readouterr().err
        assert stranger.poll() is None
        run.update_status(pid=ours.pid)
        assert _json(capsys, "runs", "stop")["pid"] == ours.pid
        assert ours.wait(10) == -15
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


def test_checkpoints_are_listed_by_step(home, capsys):
    run = make_run(home)
    for step in (12, 4, 8):
        add_checkpoint(run, step, heldout_loss=1.0 / step)
    rows = _json(capsys, "checkpoints", "ls")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[0]["heldout_loss"] == 0.25
    assert main(["checkpoints", "ls", run.id]) == 0
    assert "checkpoint-epoch3-step12-files1" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["{name}", "{run}/{name}", "{path}"])
def test_a_checkpoint_is_found_by_name_by_run_and_by_folder(spelling, home, capsys):
    run = make_run(home)
    path = add_checkpoint(run, 4, heldout_loss=0.5)
    wanted = spelling.format(name=path.name, run=run.id, path=path)
    data = _json(capsys, "checkpoints", "show", wanted)
    assert (data["step"], data["facts"], data["files"]) == (4, {"heldout_loss": 0.5}, {"weights.safetensors": 1000})


def test_a_name_that_two_runs_have_must_be_written_in_full(home, capsys):
    for minutes in (0, 1):
        add_checkpoint(make_run(home, minutes=minutes), 4)
    assert main(["checkpoints", "show", "checkpoint-epoch1-step4-files1"]) == 2
    assert "2 runs have a checkpoint" in capsys.readouterr().err
    assert main(["checkpoints", "show", "checkpoint-epoch1-step5-files1"]) == 4


def test_verify_names_what_is_damaged_and_exits_1(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    assert main(["checkpoints", "verify"]) == 0
    damaged = add_checkpoint(run, 8)
    (damaged / "weights.safetensors").write_bytes(b"w" * 999 + b"x")
    capsys.readouterr()
    assert main(["checkpoints", "verify", run.id, "-q"]) == 1
    assert capsys.readouterr().out.strip() == damaged.name
    data = _json(capsys, "checkpoints", "verify", str(damaged), code=1)
    assert "SHA-256" in data["checkpoints"][0]["detail"]


def test_prune_keeps_the_newest_and_the_best(home, capsys):
    run = make_run(home)
    for step, loss in ((4, 0.1), (8, 0.5), (12, 0.7)):
        add_checkpoint(run, step, heldout_loss=loss)
    assert main(["checkpoints", "prune"]) == 2
    assert _json(capsys, "checkpoints", "prune", "--yes", code=0)["removed"] == ["checkpoint-epoch2-step8-files1"]


def test_prune_never_removes_the_only_whole_one(home, capsys):
    run = make_run(home)
    add_checkpoint(run, 4)
    damaged = add_checkpoint(run, 8)
    (damaged / "weights.safetensors").write_bytes(b"")
    assert main(["checkpoints", "prune", "--yes", "--keep-last", "0", "--keep-best", "0"]) == 0
    capsys.readouterr()
    assert "checkpoint-epoch1-step4-files1" in [row["name"] for row in _json(capsys, "checkpoints", "ls")]


def test_two_checkpoints_side_by_side(home, capsys):
    run = make_run(home)
    for step, loss in ((4, 0.5), (8, 0.25)):
        add_checkpoint(run, step, heldout_loss=loss)
    data = _json(capsys, "checkpoints", "compare", "checkpoint-epoch1-step4-files1", "checkpoint-epoch2-step8-files1")
    assert data["heldout_loss"] == [0.5, 0.25]


def test_top_prints_one_frame_of_the_running_run(home, capsys):
    run = make_run(home)
    make_run(home, name="later", minutes=9)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", run.id])
    try:
        run.update_status(state="running", pid=child.pid, steps_total=24)
        assert main(["top", "--once", "--logs"]) == 0
        out = capsys.readouterr().out
        assert f"{run.id}  running  pid {child.pid}" in out
        assert "step      12/24" in out
        assert "50 %" in out
        assert "loss      1.9000  █" in out
        assert "1,200 tokens/s" in out
        assert "0:12, 0:12 left" in out
        assert "step 12/12" in out
        assert _json(capsys, "top", "--once")["seconds_left"] == pytest.approx(12.0)
    finally:
        child.kill()
        child.wait()


def test_top_draws_frame_after_frame_until_ctrl_c(home, capsys, monkeypatch):
    run = make_run(home)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("nightschool.cli.top.time.sleep", nap)
    assert main(["top", "--refresh", "2"]) == 0
    assert naps == [2.0, 2.0, 2.0]
    assert run.id in capsys.readouterr().out


def test_top_without_a_run_exits_4_and_a_refresh_of_0_is_refused(home, capsys):
    assert main(["top", "--once"]) == 4
    assert main(["top", "--once", "--refresh", "0"]) == 2


def test_a_sparkline_has_the_newest_at_the_right_and_takes_any_values():
    assert sparkline([3, 2, 1]) == "█▅▁"
    assert sparkline([1.0] * 100) == "▁" * 40
    assert sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000), width=10)) == 10
    assert (duration(42), duration(187), duration(8100)) == ("0:42", "3:07", "2:15:00")


def test_the_curves_of_a_run_and_of_a_checkpoint_are_drawn(home, capsys, monkeypatch):
    run = make_run(home)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["checkpoints", "plot"]) == 0
    drawn = capsys.readouterr().out
    assert all(len(line) <= 60 for line in drawn.splitlines())
    for name in ("loss", "held-out loss", "learning rate"):
        assert f"\n{name}\n" in drawn
    top = next(line for line in drawn.splitlines() if line.strip().startswith("3 ┤"))
    assert chr(0x2800) < top.partition("┤")[2] < chr(0x2900)  # the curve begins at the top left
    data = _json(capsys, "checkpoints", "plot", run.id)
    assert data["curves"]["held-out loss"] == [{"step": s, "value": pytest.approx(3.2 - 0.1 * s)} for s in (4, 8, 12)]
    path = add_checkpoint(run, 8)
    kept = {"loss_steps": [4, 8], "loss_history": [2.0, 1.0], "learning_rates": [1e-3, 5e-4]}
    (path / "training_metrics.json").write_text(json.dumps(kept))
    data = _json(capsys, "checkpoints", "plot", path.name)
    assert data["curves"]["loss"] == [{"step": 4, "value": 2.0}, {"step": 8, "value": 1.0}]


def test_a_run_without_figures_cannot_be_drawn(home, capsys):
    run = make_run(home)
    run.metrics_path.unlink()
    assert main(["checkpoints", "plot", run.id]) == 4
    assert "has no figures yet" in capsys.readouterr().err


def test_a_picture_needs_the_extra_and_says_so(home, capsys, monkeypatch):
    make_run(home)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["checkpoints", "plot", "--save", "x.png"]) == 2
    assert "pip install 'nightschool[plot]'" in capsys.readouterr().err


def test_a_picture_is_written_where_matplotlib_is(home, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    make_run(home)
    assert main(["checkpoints", "plot", "--save", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=50),
    st.integers(1, 200),
    st.integers(1, 20),
)
def test_a_chart_has_its_size_whatever_the_values(points, width, height):
    lines = chart("loss", points, width=width, height=height).splitlines()
    if len(lines) > 1:
        assert len(lines) == height + 2
        assert all(len(line) <= max(width, 14) for line in lines[1:-1])
