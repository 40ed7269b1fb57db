"""When cycles fall due: no drift, and days when the clock changes."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.config.recipe import Schedule
from nightschool.errors import UsageError
from nightschool.jobs.schedule import Timetable, format_hours, roughly

PARIS = ZoneInfo("Europe/Paris")
START = datetime(2026, 1, 1, 2, 30, tzinfo=UTC)


def test_a_simulated_year_of_days_has_no_drift_however_long_cycles_take():
    timetable = Timetable(86400)
    due, starts = START, []
    for night in range(365):
        starts.append(due)
        ended = due + timedelta(minutes=7 * night % 300, seconds=0.1)
        due = timetable.next_due(START, ended)
    assert starts == [START + timedelta(days=k) for k in range(365)]


def test_an_interval_that_is_no_whole_number_of_seconds_does_not_drift():
    timetable = Timetable(0.7)
    assert timetable.next_due(START, START + timedelta(seconds=0.7 * 10**6)) == START + timedelta(
        seconds=0.7 * (10**6 + 1)
    )


@given(every=st.floats(0.01, 10**7), after=st.floats(-(10**6), 10**9), offset=st.integers(-12, 12))
def test_the_next_due_moment_is_the_first_one_of_the_grid_that_is_later(every, after, offset):
    timetable, moment = Timetable(every), START + timedelta(seconds=after)
    interval = timedelta(seconds=every)
    due = timetable.next_due(START, moment)
    assert due > moment or due == START
    assert (due - START) % interval == timedelta(0)
    assert due == START or due - interval <= moment


@pytest.mark.parametrize("cron", ["30 2 * * *", "0 2 * * *", "0 3 * * *", "59 2 * * *"])
@pytest.mark.parametrize(
    "change", [datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)], ids=["spring", "autumn"]
)
def test_days_when_the_clock_changes_fire_once(cron, change):
    timetable = Timetable(1, cron, "Europe/Paris")
    before = (change - timedelta(days=1)).replace(tzinfo=PARIS)
    fired = list(timetable.due_times(before, before, before + timedelta(days=3) - timedelta(hours=2)))
    days = [due.astimezone(PARIS).date() for due in fired]
    assert len(days) == len(set(days)) == 3


@pytest.mark.parametrize(
    "change", [datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)], ids=["spring", "autumn"]
)
def test_a_restart_in_the_changing_hour_neither_repeats_nor_forgets(change):
    timetable = Timetable(1, "30 2 * * *", "Europe/Paris")
    begin = change.replace(tzinfo=UTC) - timedelta(hours=12)
    all_due = list(timetable.due_times(begin, begin, begin + timedelta(days=3)))
    for minutes in range(0, 36 * 60, 5):
        moment = begin + timedelta(minutes=minutes)
        assert timetable.next_due(moment, moment) == next(due for due in all_due if due > moment)


def test_a_cron_that_runs_every_half_hour_also_runs_in_both_hours_of_autumn():
    timetable = Timetable(1, "*/30 * * * *", "Europe/Paris")
    begin = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)
    fired = list(timetable.due_times(begin, begin, begin + timedelta(hours=2)))
    assert fired == [begin + timedelta(minutes=30 * k) for k in range(1, 5)]


@pytest.mark.parametrize(
    ("cron", "timezone", "message"),
    [
        ("every night", "UTC", "schedule.cron 'every night' is not a cron expression"),
        ("0 0 30 2 *", "UTC", "is not a cron expression"),
        ("0 3 * * *", "Mars/Olympus", "schedule.timezone 'Mars/Olympus' is not a time zone"),
        ("0 3 * * *", "../../etc/passwd", "is not a time zone"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_key(cron, timezone, message):
    with pytest.raises(UsageError, match=message):
        Timetable(1, cron, timezone)


def test_the_log_names_the_interval_in_hours():
    assert str(Timetable.of(Schedule())) == "interval: 24h"
    assert str(Timetable.of(Schedule(every="15m"))) == "interval: 0.25h"
    assert str(Timetable.of(Schedule(cron="0 3 * * *", timezone="Europe/Paris"))) == "cron: 0 3 * * * Europe/Paris"
    assert format_hours(90) == "90s"
    assert [roughly(seconds) for seconds in (86400, 83571, 750, 40)] == ["24h", "23.21h", "12.5m", "40s"]
