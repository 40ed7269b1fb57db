"""Processes: their environment, their log, their signals, their exit codes."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nightschool.errors import Conflict
from nightschool.jobs import launch
from nightschool.jobs.launch import CycleContext, child_environment, settle_status, start_process, wait_for
from nightschool.jobs.processes import ask_to_stop, how_it_ended, wait_for_stranger
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.work.processes import command
from nightschool.work.stop import Stop

TRAINER = """
import os, signal, sys, time
print("pgid", os.getpgid(0) == os.getpid(), flush=True)
print("malloc", os.environ["MALLOC_MMAP_THRESHOLD_"], os.environ.get("OMP_WAIT_POLICY"), flush=True)
def stop(number, frame):
    print("saving", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
what = sys.argv[1]
if what == "ok":
    print("half a line", end="", flush=True)
elif what == "fail":
    print("error: bad", file=sys.stderr)
    sys.exit(3)
else:
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    (tmp_path / "fake_trainer.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # which all tests have
    return tmp_path / "log.txt"


@pytest.fixture
def run(tmp_path):
    return RunStore(Home(tmp_path / "home").ensure()).create({"name": "bot"}, name="bot")


def _wait(log, what, **more):
    from_byte = log.stat().st_size if log.exists() else 0
    process = start_process([sys.executable, "-m", "fake_trainer", what], log=log, machine=more.pop("machine", "alone"))
    return wait_for(process, log=log, from_byte=from_byte, stop=more.pop("stop", Stop()), **more)


def test_the_log_goes_to_the_file_and_line_by_line_to_who_listens(trainer):
    lines = []
    assert _wait(trainer, "ok", on_line=lines.append) == 0
    assert lines == ["pgid True", "malloc 1073741824 None", "half a line"]
    assert trainer.read_text().splitlines() == lines
    more = []
    _wait(trainer, "ok", on_line=more.append)
    assert more == lines, "what was in the log before is not told again"


def test_beside_a_server_threads_do_not_spin(trainer):
    lines = []
    _wait(trainer, "ok", on_line=lines.append, machine="shared")
    assert lines[1] == "malloc 1073741824 PASSIVE"


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert child_environment("shared")["OMP_WAIT_POLICY"] == "ACTIVE"


def test_errors_land_in_the_log_and_the_exit_code_comes_back(trainer):
    lines = []
    assert _wait(trainer, "fail", on_line=lines.append) == 3
    assert lines[-1] == "error: bad"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_child_which_saves_and_exits_75(trainer, number):
    lines = []

    def on_line(line):
        lines.append(line)
        if line == "ready":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert _wait(trainer, "wait", on_line=on_line) == 75
    assert lines[-1] == "saving"
    assert signal.getsignal(number) is before


def test_a_stop_that_came_before_the_child_ends_it_too(trainer):
    stop = Stop()
    stop.request("SIGTERM")
    assert _wait(trainer, "wait", stop=stop) in (75, -signal.SIGTERM)


def test_a_signal_wakes_a_sleeper_at_once():
    with Stop() as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert stop.wait(3600)  # who slept on would meet the time limit of the test


def test_without_a_signal_a_sleeper_sleeps():
    with Stop() as stop:
        assert not stop.wait(0.01)


@pytest.mark.parametrize(
    ("exit_code", "stopped", "state"), [(-9, False, "failed"), (-15, True, "interrupted"), (75, False, "interrupted")]
)
def test_a_process_that_was_killed_leaves_no_running_status(run, exit_code, stopped, state):
    run.update_status(state="running", pid=2**22 + 1)  # nobody has that number
    settle_status(run, exit_code, stopped=stopped)
    assert run.status.state == state
    assert ("SIGKILL" in (run.status.error or "")) == (exit_code == -9)


def test_the_status_of_a_run_that_another_process_trains_is_that_ones(run):
    run.update_status(state="running", pid=os.getpid())
    settle_status(run, 1, stopped=False)
    assert run.status.state == "running"


def test_what_a_process_said_of_its_end_itself_stays(run):
    run.update_status(state="failed", error="the loss became NaN", exit_code=1)
    settle_status(run, 1, stopped=False)
    assert run.status.error == "the loss became NaN"


def test_training_and_the_gate_are_processes_that_are_told_home_and_run(run, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "start_process", lambda line, **_: asked.append(line))
    monkeypatch.setattr(launch, "wait_for", lambda *_, **__: 0)
    launch.run_training(run, CycleContext(), resume="latest")
    launch.run_gate(run, CycleContext(), candidate="bot@b", champion="bot@a")
    where = ("--home", str(run.home.path), "--run", run.id)
    assert asked == [
        command("train", *where, "--resume", "latest"),
        command("compare", *where, "--candidate", "bot@b", "--champion", "bot@a"),
    ]


def test_only_the_process_that_trains_the_run_is_asked_to_stop(run):
    trainer, successor = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) for _ in range(2))
    try:
        run.update_status(state="running", pid=successor.pid, pid_created_at=1.0)  # its number was another's before
        assert run.status.find_process() is None
        assert run.status.effective_state == "interrupted"
        with pytest.raises(Conflict, match="its state is interrupted"):
            ask_to_stop(run)
        run.update_status(pid=trainer.pid)
        assert run.status.effective_state == "running"
        assert ask_to_stop(run) == trainer.pid
        assert trainer.wait(60) == -signal.SIGTERM
        assert successor.poll() is None
    finally:
        for process in (trainer, successor):
            process.kill()
            process.wait()


def test_waiting_for_a_process_of_somebody_else_ends_with_what_it_left(run):
    run.update_status(state="completed", exit_code=0)
    assert wait_for_stranger(run, Stop()) == 0


def test_ends_are_told_in_words():
    assert how_it_ended(3) == "the process exited with code 3"
    assert how_it_ended(-15) == "the process was killed by SIGTERM"
    assert how_it_ended(-64 - 9) == "the process was killed by signal 73"
