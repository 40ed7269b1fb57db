"""The scheduler: at once, on time, once only, and nothing half-done."""

import errno
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from nightschool.config.recipe import Recipe
from nightschool.errors import DataError, DiskFull, Locked
from nightschool.jobs import scheduler
from nightschool.jobs.outcome import CycleRecord, CycleResult
from nightschool.jobs.scheduler import Scheduler, schedule_lock_path
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.work.stop import Stop

START = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class FakeClock(Stop):
    """Time that passes only when somebody waits, or when a cycle takes long; a signal comes when it is `until`."""

    def __init__(self, until):
        super().__init__()
        self.moment, self._until = START, until
        self.sleeps_through = {}

    def now(self):
        return self.moment

    def wait(self, seconds):
        self.moment += timedelta(seconds=seconds)
        for asleep_at in [at for at in self.sleeps_through if at <= self.moment]:
            self.moment += self.sleeps_through.pop(asleep_at)
        if self.moment >= self._until:
            self.reason = "SIGTERM"
        return self.requested


class DueCycle:
    """A whole scheduler around fake cycles; remembers what ran when."""

    def __init__(self, tmp_path, *, until=START + 10 * DAY, takes=HOUR, outcome="promoted", **schedule):
        self.home = Home(tmp_path / "home").ensure()
        self.stop = self.clock = FakeClock(until)
        self.takes, self.outcome = takes, outcome
        self.ran, self.resumed, self.lines, self.previous = [], [], [], []
        self.recipe = Recipe(name="bot", base="new:tiny", data=[{"path": "a.json"}], schedule=schedule)
        self.ledger = Ledger(Database(self.home).connect())

    def cycle(self, home, recipe, *, trigger, root, previous=None, around=None):
        self.ran.append((self.clock.moment, trigger))
        self.previous.append(previous)
        self.clock.moment += self.takes
        outcome = self.outcome(len(self.ran)) if callable(self.outcome) else self.outcome
        if isinstance(outcome, Exception):
            raise outcome
        return CycleResult(outcome, "done", run_id=None, data_fingerprint=f"data {len(self.ran)}")

    def go_on(self, home, run_id, *, around=None):
        self.resumed.append(run_id)
        return CycleResult(self.outcome if isinstance(self.outcome, str) else "promoted", "done", run_id=run_id)

    def load(self):
        return self.recipe

    def scheduler(self):
        return Scheduler(
            self.home,
            self.load,
            ledger=self.ledger,
            root=Path.cwd(),
            stop=self.stop,
            clock=self.clock.now,
            say=self.lines.append,
        )

    def serve(self):
        with mock.patch.multiple(scheduler, run_cycle=self.cycle, continue_cycle=self.go_on):
            return self.scheduler().serve()

    @property
    def entries(self):
        return [(cycle.trigger, cycle.outcome) for cycle in reversed(self.ledger.ls("bot"))]


def test_it_trains_at_once_and_then_on_time_whatever_a_cycle_takes(tmp_path):
    night = DueCycle(tmp_path, until=START + 4 * DAY + HOUR)
    assert night.serve() == 0
    assert night.ran == [
        (START, "start"),
        *((START + k * DAY, "due") for k in (1, 2, 3, 4)),
    ]
    assert night.lines[0] == "[Scheduler] Starting scheduled training (interval: 24h)"
    assert "[Scheduler] Waiting 23h for next training (at 2026-11-22 09:00:00 UTC)" in night.lines


def test_the_ledger_has_every_cycle_with_when_it_was_due(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY + HOUR)
    night.serve()
    assert [(c.due_at, c.trigger, c.outcome, c.data_fingerprint) for c in reversed(night.ledger.ls("bot"))] == [
        (START, "start", "promoted", "data 1"),
        (START + DAY, "due", "promoted", "data 2"),
    ]


def test_a_simulated_year_has_no_drift(tmp_path):
    night = DueCycle(tmp_path, until=START + 365 * DAY, takes=timedelta(minutes=47, seconds=13))
    night.serve()
    assert [moment for moment, _ in night.ran] == [START + k * DAY for k in range(365)]


def test_cron_days_when_the_clock_changes_run_once(tmp_path):
    night = DueCycle(tmp_path, until=datetime(2027, 3, 30, 12, tzinfo=UTC), cron="30 2 * * *", timezone="Europe/Paris")
    night.clock.moment = datetime(2027, 3, 26, 12, tzinfo=UTC)
    night.serve()
    assert [f"{moment:%d %H:%M}" for moment, trigger in night.ran if trigger == "due"] == [
        "27 01:30",
        "28 01:00",  # 02:30 does not exist: right after the gap
        "29 00:30",
        "30 00:30",
    ]


def test_what_was_missed_while_the_machine_slept_is_caught_up_exactly_once(tmp_path):
    night = DueCycle(tmp_path, until=START + 8 * DAY + HOUR)
    night.clock.sleeps_through = {START + 20 * HOUR: 5 * DAY}
    night.serve()
    assert [trigger for _, trigger in night.ran] == ["start", "catch_up", "due", "due", "due"]
    assert [moment for moment, _ in night.ran][2:] == [START + k * DAY for k in (6, 7, 8)]
    assert any("Missed 5 trainings" in line and "catching up once" in line for line in night.lines)


def test_what_was_missed_is_skipped_where_the_recipe_says_so(tmp_path):
    night = DueCycle(tmp_path, until=START + 7 * DAY + HOUR, missed="skip")
    night.clock.sleeps_through = {START + 20 * HOUR: 5 * DAY}
    night.serve()
    assert [trigger for _, trigger in night.ran] == ["start", "due", "due"]
    assert ("due", "skipped") in night.entries


def test_cycles_that_fall_due_while_one_runs_are_skipped_and_counted(tmp_path):
    night = DueCycle(tmp_path, until=START + 6 * DAY, takes=2 * DAY + HOUR)
    night.serve()
    assert [moment for moment, _ in night.ran] == [START, START + 3 * DAY]
    assert any("Skipped 2 trainings that fell due while one ran" in line for line in night.lines)
    assert any("overlap: 2 fell due" in (cycle.detail or "") for cycle in night.ledger.ls("bot"))


def test_a_night_that_fails_is_entered_and_the_next_one_comes(tmp_path):
    outcomes = {1: DataError("train.json:3: no JSON"), 2: RuntimeError("a mistake of ours"), 3: "promoted"}
    night = DueCycle(tmp_path, until=START + 2 * DAY + HOUR, outcome=outcomes.get)
    night.serve()
    assert [outcome for _, outcome in night.entries] == ["failed", "failed", "promoted"]
    assert "[Error] Training failed: train.json:3: no JSON" in night.lines


def test_the_next_cycle_is_told_what_the_last_finished_one_had(tmp_path):
    outcomes = {1: "refused", 2: "skipped", 3: "promoted"}
    night = DueCycle(tmp_path, until=START + 2 * DAY + HOUR, outcome=outcomes.get)
    night.serve()
    assert night.previous[0] is None
    assert [(one.data_fingerprint, one.outcome) for one in night.previous[1:]] == [("data 1", "refused")] * 2


def test_a_second_scheduler_is_locked_out_and_told_who_holds_the_lock(tmp_path):
    night = DueCycle(tmp_path)
    with (
        lock(schedule_lock_path(night.home, "bot"), "the schedule of bot"),
        pytest.raises(Locked, match=r"\(pid \d+\) holds the schedule of bot"),
    ):
        night.serve()
    assert night.ran == []


def test_while_paused_nothing_begins_and_afterwards_it_goes_on_by_the_clock(tmp_path):
    night = DueCycle(tmp_path, until=START + 3 * DAY + HOUR)
    night.ledger.pause("bot")
    run = night.cycle

    def wait(seconds, wait=night.clock.wait):
        stopped = wait(seconds)
        if night.clock.moment > START + DAY + HOUR:
            night.ledger.resume("bot")
        return stopped

    night.clock.wait = wait
    night.cycle = run
    night.serve()
    assert [moment for moment, _ in night.ran] == [START + 2 * DAY, START + 3 * DAY]
    assert night.entries[:2] == [("start", "skipped"), ("due", "skipped")]


def test_an_interrupted_cycle_exits_75_and_the_next_start_goes_on_with_its_run(tmp_path):
    first = DueCycle(tmp_path)
    begun = []

    def interrupted(home, recipe, **_):
        begun.append(_run_of_a_cycle(first))
        first.stop.reason = "SIGTERM"
        return CycleResult("interrupted", "at step 5", run_id=begun[0].id)

    first.cycle = interrupted
    assert first.serve() == 75
    assert first.entries == [("start", "interrupted")]

    second = DueCycle(tmp_path, until=START + DAY + 2 * HOUR)
    second.clock.moment = START + HOUR
    assert second.serve() == 0
    assert second.resumed == [begun[0].id]
    assert second.entries == [("start", "interrupted"), ("resume", "promoted"), ("due", "promoted")]


def test_a_scheduler_that_was_killed_leaves_a_cycle_that_the_next_start_finds_and_resumes(tmp_path):
    night = DueCycle(tmp_path, until=START + HOUR / 2)
    night.ledger.begin("bot", START - HOUR, "due")
    run = _run_of_a_cycle(night)
    night.serve()
    assert night.resumed == [run.id]
    assert night.entries == [("due", "interrupted"), ("resume", "promoted")]


def test_a_resume_that_fails_is_followed_by_a_new_cycle_at_once(tmp_path):
    night = DueCycle(tmp_path, until=START + 2 * HOUR)
    cycle = night.ledger.begin("bot", START - HOUR, "due")
    night.ledger.finish(cycle, "interrupted", run_id=_run_of_a_cycle(night).id)

    def changed(home, run_id, *, around=None):
        night.clock.moment += timedelta(minutes=1)
        return CycleResult("failed", "the data changed", run_id=run_id)

    night.go_on = changed
    night.serve()
    assert night.entries == [("due", "interrupted"), ("resume", "failed"), ("start", "promoted")]


def test_a_restart_after_missed_nights_catches_up_once_and_keeps_the_rhythm_from_then_on(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY + HOUR)
    night.ledger.finish(night.ledger.begin("bot", START - 5 * DAY, "due"), "promoted")
    night.serve()
    assert night.ran == [(START, "catch_up"), (START + DAY, "due")]


def test_a_restart_with_missed_skip_waits_for_the_next_due_time_of_the_old_rhythm(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY, missed="skip")
    night.ledger.finish(night.ledger.begin("bot", START - 5 * DAY - 3 * HOUR, "due"), "promoted")
    night.serve()
    assert night.ran == [(START + 21 * HOUR, "due")]


def test_a_recipe_that_breaks_while_it_waits_keeps_the_timetable_and_fails_the_night(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY + HOUR)
    texts = iter([night.recipe, night.recipe])
    night.load = lambda: next(texts, None) or (_ for _ in ()).throw(DataError("recipe.yaml:3: broken"))
    assert night.serve() == 0
    assert [outcome for _, outcome in night.entries] == ["promoted", "failed"]


def _run_of_a_cycle(night):
    run = RunStore(night.home).create(night.recipe.as_plain(), name="bot")
    CycleRecord("due", str(Path.cwd()), "new:tiny", None, "data", 3).write(run)
    return run


def test_a_cycle_that_the_ledger_has_already_is_not_done_twice(tmp_path):
    night = DueCycle(tmp_path, until=START + 2 * DAY + HOUR)
    night.ledger.finish(night.ledger.begin("bot", START + DAY, "due"), "promoted")
    night.serve()
    assert [moment for moment, _ in night.ran] == [START, START + 2 * DAY]
    assert any("is done already" in line for line in night.lines)


def full_disk_of(ledger_method):
    if ledger_method == "begin":
        return DiskFull("There is no room on the disk for state.db.")
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.db")


@pytest.mark.parametrize("method", ["begin", "finish", "paused"])
def test_a_full_disk_costs_a_night_and_not_the_scheduler(method, tmp_path, monkeypatch):
    night = DueCycle(tmp_path, until=START + 3 * DAY + HOUR)
    whole = getattr(Ledger, method)

    def write(ledger, *arguments, **more):
        # Full in the first two nights.
        if night.clock.moment < START + DAY + 2 * HOUR:
            raise full_disk_of(method)
        return whole(ledger, *arguments, **more)

    monkeypatch.setattr(Ledger, method, write)
    assert night.serve() == 0
    errors = [line for line in night.lines if line.startswith("[Error]")]
    assert len(errors) >= 2
    assert all("No space left" in line or "no room on the disk" in line for line in errors)
    if method == "begin":  # nothing could be kept, so nothing was trained
        assert night.ran == [(START + k * DAY, "due") for k in (2, 3)]
        assert night.entries == [("due", "promoted")] * 2
    else:  # what was trained is entered when there is room again
        assert night.ran == [(START, "start"), *((START + k * DAY, "due") for k in (1, 2, 3))]
        assert night.entries == [("start", "promoted"), *[("due", "promoted")] * 3]


def test_a_log_on_a_full_disk_does_not_end_the_scheduler(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY + HOUR)

    def say(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    night.lines = type("Full", (), {"append": staticmethod(say)})()
    assert night.serve() == 0
    assert night.entries == [("start", "promoted"), ("due", "promoted")]


def test_another_trouble_with_the_log_is_not_hidden(tmp_path):
    night = DueCycle(tmp_path, until=START + DAY + HOUR)

    def say(line):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    night.lines = type("Gone", (), {"append": staticmethod(say)})()
    with pytest.raises(BrokenPipeError):
        night.serve()
