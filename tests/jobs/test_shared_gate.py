"""The gate's process that runs of a group share: when it lives, what it is told, and what is left if it dies."""

import json
import sys
import threading

import pytest

from nightschool.jobs import launch, shared_gate
from nightschool.jobs.gate_ahead import GateAhead
from nightschool.jobs.launch import INTERRUPTED_EXIT_CODE, CycleContext, run_gate
from nightschool.jobs.shared_gate import SharedGate
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.views.runs import FAR_SECONDS, NEAR_SECONDS

# Notes what it is told; of a candidate called `bad` it says that it failed, at `slow` it says nothing, and `deadly` ends it.
GATE = """
import json, pathlib, sys
for line in sys.stdin:
    told = json.loads(line)
    print(line, end="", flush=True)
    candidate = told.get("candidate")
    if candidate == "deadly":
        sys.exit(1)
    if candidate not in (None, "slow"):
        run = pathlib.Path(sys.argv[1]) / "runs" / told["run"]
        bad = candidate == "bad"
        (run / "gate.tmp").write_text(json.dumps({"exit_code": int(bad), "error": "it is bad" if bad else None}))
        (run / "gate.tmp").rename(run / "gate.json")
"""


class Group:
    def __init__(self, path):
        self.home = Home(path / "home").ensure()
        self.folder = path / "group"
        self.gate = SharedGate(self.home, self.folder)
        self.runs = [RunStore(self.home).create({"name": name}, name=name) for name in ("ant", "bee")]
        for run in self.runs:
            run.update_status(state="running", steps_total=100)

    def told(self):
        return [json.loads(line) for line in (self.folder / "log.txt").read_text().splitlines()]


@pytest.fixture
def group(tmp_path):
    return Group(tmp_path)


@pytest.fixture
def started(group, monkeypatch):
    found, start = [], launch.start_process

    def fake(_, **settings):
        found.append(start([sys.executable, "-c", GATE, str(group.home.path)], **settings))
        return found[-1]

    monkeypatch.setattr(shared_gate, "start_process", fake)
    monkeypatch.setattr("nightschool.jobs.head_start.LOOK_SECONDS", 0.0)
    return found


def examined(run, ahead, candidate, **context):
    return run_gate(run, CycleContext(ahead=ahead, **context), candidate=candidate, champion=None)


def test_all_candidates_are_named_to_one_process_which_ends_with_the_last_run(group, started):
    ant, bee = group.runs
    around = CycleContext()
    with group.gate.of(bee, around) as of_bee:
        with group.gate.of(ant, around) as of_ant:
            of_ant.look()
            of_bee.look()
            of_ant.look()
            assert examined(ant, of_ant, "ant@1") == 0
        [process] = started
        assert process.poll() is None
        assert examined(bee, of_bee, "bee@1") == 0
        assert len(started) == 1
    assert process.poll() is not None
    named = [(one["run"], one.get("candidate")) for one in group.told()]
    assert named == [(ant.id, None), (bee.id, None), (ant.id, "ant@1"), (bee.id, "bee@1")]


def test_what_went_wrong_with_one_is_passed_on(group, started):
    ant, _ = group.runs
    lines = []
    with group.gate.of(ant, CycleContext()) as ahead:
        ahead.look()
        assert examined(ant, ahead, "bad", on_line=lines.append) == 1
        assert lines == ["it is bad"]
        assert examined(ant, ahead, "ant@2") == 0  # what was said of another candidate is forgotten


def test_one_that_dies_leaves_each_run_to_a_gate_of_its_own(group, started, monkeypatch):
    late = []
    monkeypatch.setattr(launch, "run_child", lambda *line, **_: late.append(line[2:]) or 0)
    ant, bee = group.runs
    around = CycleContext()
    with group.gate.of(ant, around) as of_ant, group.gate.of(bee, around) as of_bee:
        of_ant.look()
        assert examined(ant, of_ant, "deadly") == 0
        assert examined(bee, of_bee, "bee@1") == 0
    assert late == [("--candidate", "deadly"), ("--candidate", "bee@1")]


def test_a_member_that_is_stopped_waits_no_longer_and_the_others_go_on(group, started):
    ant, bee = group.runs
    around = CycleContext()
    with group.gate.of(bee, around) as of_bee:
        of_bee.look()
        with group.gate.of(ant, around) as of_ant:
            context = CycleContext(ahead=of_ant)
            found = []
            waiting = threading.Thread(
                target=lambda: found.append(run_gate(ant, context, candidate="slow", champion=None))
            )
            waiting.start()
            context.stop.request("a request")
            waiting.join(30)
            assert found == [INTERRUPTED_EXIT_CODE]
        assert examined(bee, of_bee, "bee@1") == 0


def test_it_lives_only_while_the_end_of_a_training_is_near(group, started):
    ant, _ = group.runs

    def learns(seconds_left):
        with ant.metrics_path.open("a") as file:
            file.write(json.dumps({"step": 50, "seconds": float(seconds_left)}) + "\n")

    with group.gate.of(ant, CycleContext()) as ahead:
        learns(NEAR_SECONDS + 1)
        ahead.look()
        assert not started
        learns(NEAR_SECONDS - 1)
        ahead.look()
        learns(FAR_SECONDS + 1)
        ahead.look()
        [process] = started
        assert process.poll() is not None


def test_another_gate_that_waits_in_the_home_goes_first(group, started, monkeypatch):
    ant, bee = group.runs
    monkeypatch.setattr(launch, "run_child", lambda *_, **__: 0)
    other = GateAhead(bee, CycleContext())
    monkeypatch.setattr("nightschool.jobs.gate_ahead.start_process", shared_gate.start_process)
    with other, group.gate.of(ant, CycleContext()) as ahead:
        other.look()
        ahead.look()
        assert len(started) == 1
        assert examined(ant, ahead, "ant@1") == 0
        other.close()
        ahead.look()
        assert len(started) == 2


def test_a_fault_of_the_head_start_does_not_reach_the_training(group, started):
    ant, _ = group.runs
    news = []
    with group.gate.of(ant, CycleContext(on_news=news.append)) as ahead:
        ant.status_path.write_text("{")
        ahead.look()
        ahead.look()
    assert not started
    assert len(news) == 1
