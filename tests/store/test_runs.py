"""Runs: unique folders, a status that is never half-written, and removal."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from nightschool.errors import Conflict, Damaged, NameRefused, NotFound
from nightschool.events import read_events
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from tests.support.crash_points import fill_disk_everywhere, kill_everywhere

MOMENT = datetime(2026, 11, 21, 2, 30, tzinfo=UTC)
RECIPE = {
    "name": "bot",
    "base": "new:tiny",
    "data": [{"path": "a.json", "from": None}],
    "train": {"learning_rate": 2e-6, "note": "no: ä"},
}


@pytest.fixture
def store(tmp_path):
    return RunStore(Home(tmp_path / "home"))


def test_a_new_run(store):
    run = store.create(RECIPE, name="bot", moment=MOMENT)
    assert run.id == "bot-20261121_023000"
    assert run.name == "bot"
    assert run.recipe() == RECIPE
    assert run.status.state == "queued"
    assert not run.status.is_final
    assert store.get(run.id) == run
    run.events.write("began", step=1)
    assert [(row["event"], row["run_id"], row["step"]) for row in read_events(run.events_path)] == [
        ("began", run.id, 1)
    ]
    assert {path.name for path in run.path.iterdir()} == {"recipe.yaml", "status.json", "checkpoints", "events.jsonl"}


def test_runs_of_one_second_get_different_ids(store):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: store.create(RECIPE, name="bot", moment=MOMENT), range(12)))
    assert sorted(run.id for run in runs) == [f"bot-20261121_0230{second:02d}" for second in range(12)]
    assert [run.id for run in store.ls()] == sorted((run.id for run in runs), reverse=True)


def test_an_id_is_never_used_again(store):
    first = store.create(RECIPE, name="bot", moment=MOMENT)
    store.remove(first.id)
    assert store.create(RECIPE, name="bot", moment=MOMENT).id == "bot-20261121_023001"
    with pytest.raises(NotFound, match="bot-20261121_023001"):
        store.get(first.id)


def test_the_list_is_by_time_not_by_name(store):
    for name, second in (("zoo", 1), ("bot", 2), ("a-b", 3)):
        store.create(RECIPE, name=name, moment=MOMENT.replace(second=second))
    (store.home.runs / "not-a-run").mkdir()
    assert [run.name for run in store.ls()] == ["a-b", "bot", "zoo"]


def test_runs_that_are_not_there(store):
    with pytest.raises(NotFound, match="no runs yet"):
        store.get("bot-20261121_023000")
    for run_id in ("../../etc", "a/b/c-20261121_023000", "", "..-20261121_023000"):
        with pytest.raises(NameRefused):
            store.get(run_id)
    with pytest.raises(NotFound):
        store.get("removed.json")
    with pytest.raises(NameRefused):
        store.create(RECIPE, name="../bot")


def test_the_status_keeps_times_and_process(store):
    run = store.create(RECIPE, name="bot")
    status = run.update_status(state="running", pid=os.getpid(), steps_total=10)
    assert status.started_at is not None
    assert status.process_lives
    assert run.update_status(step=3) == run.status
    status = run.update_status(state="completed", candidate="bot@20261121_023000", exit_code=0)
    assert (status.step, status.steps_total, status.candidate) == (3, 10, "bot@20261121_023000")
    assert status.finished_at is not None
    resumed = run.update_status(state="running")
    assert (resumed.started_at, resumed.finished_at) == (status.started_at, None)
    with pytest.raises(ValueError, match="sleeping"):
        run.update_status(state="sleeping")
    with pytest.raises(TypeError):
        run.update_status(mood="good")


def test_a_dead_process_is_known_to_be_dead(store):
    run = store.create(RECIPE, name="bot")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert run.update_status(state="running", pid=child.pid).process_lives
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not run.status.process_lives  # A zombie does nothing any more.
    child.communicate()
    assert not run.status.process_lives
    # A later process with the same id is another one.
    assert not run.update_status(pid=os.getpid(), pid_created_at=1.0).process_lives


def test_a_run_is_asked_to_stop_until_it_is_started_again(store):
    run, other = (store.create(RECIPE, name="bot", moment=MOMENT) for _ in range(2))
    assert run.stop_request is None
    assert not run.status.shares_process
    run.request_stop("cancelled")
    assert store.get(run.id).stop_request == "cancelled"
    assert other.stop_request is None
    run.clear_stop()
    run.clear_stop()
    assert run.stop_request is None


def test_concurrent_updates_of_a_status_lose_nothing(store):
    run = store.create(RECIPE, name="bot")
    fields = ["step", "steps_total", "exit_code", "pid_created_at"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: run.update_status(**{fields[job % 4]: job // 4}), range(60)))
    assert all(getattr(run.status, field) is not None for field in fields)


def test_a_status_that_is_killed_anywhere_stays_readable(store):
    run = store.create(RECIPE, name="bot")
    for point in kill_everywhere(lambda: run.update_status(step=run.status.step + 1, error="x" * 5000)):
        assert run.status.step <= point


@pytest.mark.parametrize("stays_full", [True, False])
def test_a_full_disk_leaves_no_half_run(store, stays_full):
    store.home.ensure()
    for _ in fill_disk_everywhere(lambda: store.create(RECIPE, name="bot"), stays_full=stays_full):
        for run in store.ls():
            assert run.recipe() == RECIPE
            assert run.status.state == "queued"


def test_a_killed_creation_leaves_no_half_run(store):
    store.home.ensure()
    for _ in kill_everywhere(lambda: store.create(RECIPE, name="bot")):
        for run in store.ls():
            assert run.recipe() == RECIPE
            assert run.status.state == "queued"
    store.create(RECIPE, name="bot")
    assert not list(store.home.runs.glob("*.partial"))


def test_a_killed_removal_leaves_a_whole_run_or_none(store):
    run = store.create(RECIPE, name="bot")
    for _ in kill_everywhere(lambda: store.remove(run.id)):  # noqa: B023
        if run.path.exists():
            assert run.recipe() == RECIPE
        else:
            run = store.create(RECIPE, name="bot")


def test_a_living_run_is_not_removed(store):
    run = store.create(RECIPE, name="bot")
    run.update_status(state="running", pid=os.getpid())
    with pytest.raises(Conflict, match=rf"running in process {os.getpid()}\. Stop it first"):
        store.remove(run.id)
    run.update_status(state="interrupted")
    store.remove(run.id)
    assert store.ls() == []


@pytest.mark.parametrize("change", [{"state": "dreaming"}, {"run_id": None}])
def test_a_damaged_status_is_named(store, change):
    run = store.create(RECIPE, name="bot")
    content = json.loads(run.status_path.read_text()) | change
    run.status_path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(Damaged, match=r"status\.json"):
        run.status  # noqa: B018
