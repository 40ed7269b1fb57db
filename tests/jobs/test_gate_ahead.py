"""The gate's process that waits for a candidate: when it begins, what it is told, and that it never outlives its use."""

import json
import sys

import pytest

from nightschool.jobs import gate_ahead, launch
from nightschool.jobs.gate_ahead import GateAhead
from nightschool.jobs.launch import CycleContext, run_gate
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.views.runs import FAR_SECONDS, NEAR_SECONDS

# Writes what it is told, and ends when there is nothing more to hear.
GATE = "import sys; line = sys.stdin.readline(); print('told', line, end='', flush=True); sys.exit(0 if line else 7)"


@pytest.fixture
def run(tmp_path):
    run = RunStore(Home(tmp_path / "home").ensure()).create({"name": "bot"}, name="bot")
    run.update_status(state="running", steps_total=100)
    return run


@pytest.fixture
def started(monkeypatch):
    """The processes that were started, each with its command line."""
    found = []
    start = launch.start_process

    def fake(line, **settings):
        found.append((line, start([sys.executable, "-c", GATE], **settings)))
        return found[-1][1]

    monkeypatch.setattr(gate_ahead, "start_process", fake)
    monkeypatch.setattr("nightschool.jobs.head_start.LOOK_SECONDS", 0.0)
    return found


def learns(run, seconds_left):
    """Let the run have done half of its steps, with so many seconds to go."""
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({"step": 50, "seconds": float(seconds_left)}) + "\n")


def test_the_process_that_waits_is_told_both_names_and_decides(run, started):
    lines = []
    around = CycleContext(on_line=lines.append)
    with GateAhead(run, around) as ahead:
        ahead.look()
        ahead.look()
        [(line, process)] = started
        assert line[-1] == "--ahead"
        assert "--candidate" not in line
        around = CycleContext(on_line=lines.append, ahead=ahead)
        assert run_gate(run, around, candidate="bot@b", champion="bot@a") == 0
    assert process.poll() == 0
    assert [json.loads(one.removeprefix("told ")) for one in lines] == [{"candidate": "bot@b", "champion": "bot@a"}]


def test_it_ends_when_nobody_will_name_a_candidate(run, started):
    with GateAhead(run, CycleContext()) as ahead:
        ahead.look()
        [(_, process)] = started
        assert process.poll() is None
    assert process.poll() == 7


def test_one_that_has_died_is_replaced_by_one_that_starts_late(run, started, monkeypatch):
    late = []
    monkeypatch.setattr(launch, "start_process", lambda line, **_: late.append(line))
    monkeypatch.setattr(launch, "wait_for", lambda *_, **__: 0)
    with GateAhead(run, CycleContext()) as ahead:
        ahead.look()
        started[0][1].kill()
        started[0][1].wait()
        assert run_gate(run, CycleContext(ahead=ahead), candidate="bot@b", champion=None) == 0
    assert [line[-2:] for line in late] == [["--candidate", "bot@b"]]


def test_it_waits_only_while_the_end_of_the_training_is_near(run, started):
    with GateAhead(run, CycleContext()) as ahead:
        learns(run, NEAR_SECONDS + 1)
        ahead.look()
        assert not started
        learns(run, NEAR_SECONDS - 1)
        ahead.look()
        learns(run, FAR_SECONDS + 1)
        ahead.look()
        [(_, process)] = started
        assert process.poll() == 7
        learns(run, NEAR_SECONDS - 1)
        ahead.look()
        assert len(started) == 2


def test_one_waits_at_a_time_in_a_home(run, started):
    other = RunStore(run.home).create({"name": "cat"}, name="cat")
    with GateAhead(run, CycleContext()) as first, GateAhead(other, CycleContext()) as second:
        first.look()
        second.look()
        assert len(started) == 1
        assert second.tell("cat@b", None) is None
        first.close()
        second.look()
        assert len(started) == 2


def test_a_fault_of_the_head_start_does_not_reach_the_training(run, started):
    news = []
    with GateAhead(run, CycleContext(on_news=news.append)) as ahead:
        run.status_path.write_text("{")
        ahead.look()
        ahead.look()
    assert not started
    assert len(news) == 1
