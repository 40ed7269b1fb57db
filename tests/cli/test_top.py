"""top: one frame, frame after frame, the application, and files that are being written or broken."""

import asyncio
import json
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.cli import top as top_module
from nightschool.cli.main import main
from nightschool.cli.top.app import TopApp
from nightschool.cli.top.text import describe
from nightschool.events import now
from nightschool.store.home import Home
from nightschool.views import machine
from nightschool.views import monitor as monitor_module
from nightschool.views.metrics_rows import RowsFollower
from nightschool.views.monitor import Monitor
from tests.support.cli_home import add_checkpoint, make_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(monitor_module, "_FIRST_SECONDS", None)
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def running(home):
    """A run whose process lives."""
    run = make_run(home)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", run.id])
    run.update_status(state="running", pid=child.pid, steps_total=24)
    yield run, child
    child.kill()
    child.wait()


def _json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_top_prints_one_frame_of_the_running_run(home, running, capsys):
    run, child = running
    make_run(home, name="later", minutes=9)
    add_checkpoint(run, 8)
    assert main(["top", "--once", "--logs"]) == 0
    out = capsys.readouterr().out
    assert f"{run.id}  running  pid {child.pid}" in out
    assert "step      12/24" in out
    assert "50 %" in out
    assert "loss      1.9000  █" in out
    assert "1,200 tokens/s" in out
    assert "0:12, 0:12 left" in out
    assert "1 checkpoints, the last checkpoint-epoch2-step8-files1" in out
    assert "step 12/12" in out
    assert out.startswith("CPU ")
    data = _json(capsys, "top", "--once")
    assert data["seconds_left"] == pytest.approx(12.0)
    assert [one["run_id"].partition("-")[0] for one in data["runs"]] == ["later", "bot"]
    assert data["process"]["resident_bytes"] > 10**6
    assert data["machine"]["memory_total_bytes"] > 10**8


def test_figures_of_pretraining_are_shown_where_a_row_has_them(home, running):
    run, _ = running
    row = {"step": 13, "loss": 2.0, "perplexity": 7.39, "bits_per_byte": 0.91, "mfu": 0.424, "eta_seconds": 90.0}
    row |= {"tokens_per_second": 1000.0, "tokens_trained_total": 9, "time": now().isoformat()}
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    text = describe(Monitor(home).frame(), logs=False)
    assert "perplexity 7.39, 0.91 bits per byte" in text
    assert "MFU 42.4%" in text
    assert Monitor(home).frame()["seconds_left"] == 90.0


def test_the_last_sample_of_the_model_is_shown(home):
    run = make_run(home)
    for step in (4, 8):
        run.events.write("sample", step=step, prompt="Once", continuation=f"upon\n a {step}")
    with run.events_path.open("a") as file:
        file.write('{"event": "sam')
    assert "sample    Once … upon a 8 (step 8)" in describe(Monitor(home).frame(), logs=False)


def test_a_run_that_logs_nothing_any_more_is_told(home, running):
    run, _ = running
    row = {"step": 13, "loss": 2.0, "seconds": 13.0, "time": (now() - timedelta(seconds=300)).isoformat()}
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert "no step was logged for 5:00" in describe(Monitor(home).frame(), logs=False)


def test_the_time_left_follows_from_the_last_steps(home, running):
    run, _ = running
    run.update_status(steps_total=300)
    with run.metrics_path.open("a") as file:
        for step in range(13, 201):
            file.write(json.dumps({"step": step, "loss": 1.0, "seconds": 1000.0 + 2 * step}) + "\n")
    assert Monitor(home).frame()["seconds_left"] == pytest.approx(200.0)


def test_top_prints_frame_after_frame_until_ctrl_c(home, capsys, monkeypatch):
    run = make_run(home)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top_module, "time", SimpleNamespace(sleep=nap))
    assert main(["top", "--refresh", "2"]) == 0
    assert naps == [2.0, 2.0, 2.0]
    assert capsys.readouterr().out.count(f"{run.id}  completed") == 3


def test_top_waits_for_the_first_run_and_a_frame_of_none_exits_4(home, capsys, monkeypatch):
    assert main(["top", "--once"]) == 4
    assert main(["top", "--once", "--refresh", "0"]) == 2

    def nap(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(top_module, "time", SimpleNamespace(sleep=nap))
    assert main(["top"]) == 0
    assert "There are no runs" in capsys.readouterr().out


def test_on_a_terminal_the_application_starts(home, monkeypatch):
    started = []
    monkeypatch.setattr(top_module, "_is_terminal", lambda: True)
    monkeypatch.setattr(TopApp, "run", lambda self: started.append((self._wanted, self._refresh_seconds)))
    assert main(["top", "--refresh", "5"]) == 0
    assert started == [(None, 5.0)]


def _texts(app):
    return {name: str(app.query_one(f"#{name}").render()) for name in ("machine", "run", "log")}


async def _until(pilot, condition):
    for _ in range(1000):
        await pilot.pause(0.02)
        if condition():
            return
    raise AssertionError("it did not happen within 20 s")


def test_the_application_shows_the_runs_and_follows_the_cursor(home, running):
    run, _ = running
    later = make_run(home, name="later", minutes=9, state="failed", error="NaN")
    (later.path / "log.txt").write_text("the end of the log\n")
    app = TopApp(Monitor(home), None, refresh_seconds=0.05, logs=False)

    async def use():
        async with app.run_test(size=(110, 40)) as pilot:
            await _until(pilot, lambda: app.frame is not None)
            assert app.frame["run_id"] == run.id
            assert app._table.row_count == 2
            assert "step      12/24" in _texts(app)["run"]
            assert not app.query_one("#log").display
            await pilot.press("up")
            await _until(pilot, lambda: app.frame["run_id"] == later.id)
            await _until(pilot, lambda: "error     NaN" in _texts(app)["run"])
            await pilot.press("l")
            await pilot.pause()
            assert app.query_one("#log").display
            assert "the end of the log" in _texts(app)["log"]
            # Frames go on coming, and the choice stays.
            before = app.frame["time"]
            await _until(pilot, lambda: app.frame["time"] != before)
            assert app.frame["run_id"] == later.id
            await pilot.press("q")

    asyncio.run(use())


OSC_52 = "\x1b]52;c;ZXZpbA==\x07"


def test_no_escape_of_a_run_reaches_the_terminal(home, capsys, monkeypatch):
    """Errors of templates and uploads, and what a model says, end in the log and the status of a run."""
    run = make_run(home, state="failed", error=f"template{OSC_52}")
    run.log_path.write_text(f"upload refused{OSC_52}\n")
    monkeypatch.setattr(top_module, "time", SimpleNamespace(sleep=_interrupt))
    for words in (["top", "--logs"], ["top", "--once", "--logs"], ["runs", "logs"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert "\x1b]" not in out
        assert "upload refused\\x1b]52;c;ZXZpbA==\\x07" in out
        assert words[0] == "runs" or "template\\x1b]52" in out
    app = TopApp(Monitor(home), None, refresh_seconds=0.05, logs=True)

    async def use():
        async with app.run_test(size=(110, 40)) as pilot:
            await _until(pilot, lambda: "template\\x1b]52" in _texts(app)["run"])
            assert "upload refused\\x1b]52" in _texts(app)["log"]
            assert "\x1b" not in "".join(_texts(app).values())
            await pilot.press("q")

    asyncio.run(use())


def _interrupt(_seconds):
    raise KeyboardInterrupt


def test_the_application_waits_for_the_first_run(home):
    app = TopApp(Monitor(home), None, refresh_seconds=0.05, logs=True)

    async def use():
        async with app.run_test() as pilot:
            await _until(pilot, lambda: "There are no runs" in _texts(app)["run"])
            run = make_run(home)
            await _until(pilot, lambda: app.frame is not None and app.frame["run_id"] == run.id)

    asyncio.run(use())


def test_a_look_that_ends_once_the_application_is_closed_shows_nothing(home):
    make_run(home)
    found = Monitor(home).frame()
    app = TopApp(Monitor(home), None, refresh_seconds=60, logs=False)

    async def use():
        async with app.run_test() as pilot:
            await _until(pilot, lambda: app.frame is not None)
        # The thread that looks calls these in the application's own thread, however late it is.
        app._show(found)
        app._show_trouble("There are no runs")

    asyncio.run(use())
    assert app.frame is not found


BROKEN = [b"", b"{", b"[]", b"\xff\xfe", b'{"step": 1', b'{"step": "x"}\n', b'{"step": 3, "loss": "low"}\n', b"null\n"]


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "recipe.yaml", "log.txt", "events.jsonl"])
def test_no_broken_file_of_a_run_stops_top(name, content, home, capsys):
    make_run(home)
    broken = make_run(home, minutes=1)
    (broken.path / name).write_bytes(content)
    assert main(["top", "--once", "--logs"]) == 0
    assert broken.id in capsys.readouterr().out
    assert main(["top", broken.id, "--once"]) == 0


@pytest.mark.parametrize("content", BROKEN)
def test_no_broken_file_beside_a_run_stops_top(content, home):
    run = make_run(home)
    (add_checkpoint(run, 4) / "manifest.json").write_bytes(content)
    (home.models / "bot").mkdir(parents=True)
    (home.models / "bot" / "aliases.json").write_bytes(content)
    assert main(["top", "--once"]) == 0


def test_a_metrics_file_is_read_once_and_again_from_its_beginning_when_it_was_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = RowsFollower(path)
    assert follower.update() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in follower.update()] == [1, 2]
    first = follower.rows[0]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert [row["step"] for row in follower.update()] == [1, 2, 3]
    assert follower.rows[0] is first
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n')
    other.replace(path)
    assert [row["step"] for row in follower.update()] == [1]


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([b'{"step": 1}\n', b'{"step": 2, "loss": 1.5}\n', b"x\n", b"\n", b'{"a": 1}\n'])),
    st.data(),
)
def test_rows_do_not_depend_on_where_the_file_was_cut(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    whole = b"".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    follower = RowsFollower(path)
    with path.open("wb", buffering=0) as file:
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            file.write(whole[start:end])
            follower.update()
    assert follower.rows == [json.loads(line) for line in lines if b"step" in line]


def test_gpus_are_read_from_nvidia_smi(home, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho '0, NVIDIA H200, 97, 70000, 143771, 61, 640.5'\necho '1, X, [N/A], 1, 2, 3, [N/A]'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tool))
    make_run(home)
    frame = Monitor(home).frame()
    assert frame["machine"]["gpus"][0]["busy_percent"] == 97.0
    text = describe(frame, logs=False)
    assert "GPU 0 NVIDIA H200  97 % busy  73.4 GB of 151 GB  61 °C  640 W" in text
    assert "GPU 1 X  1.05 MB of 2.1 MB  3 °C" in text
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert Monitor(home).frame()["machine"]["gpus"] == []
