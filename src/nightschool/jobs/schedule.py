"""When cycles fall due. Pure: moments go in, moments come out.

An interval counts from its anchor, `anchor + k * interval`, so that the length of the cycles never shifts the next
ones. A cron expression is read in its time zone; on the two days a year when the clock changes, a time of day that
does not exist fires once, right after the gap, and a time of day that comes twice fires once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from nightschool.config.recipe import Schedule
from nightschool.errors import UsageError
from nightschool.units import format_seconds


@dataclass(frozen=True)
class Timetable:
    """When cycles are due: every `every_seconds` seconds from an anchor, or by `cron` in `timezone`.

    Raises:
        UsageError: If the cron expression or the time zone cannot be read.
    """

    every_seconds: float
    cron: str | None = None
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.cron is None:
            return
        try:
            CronSim(self.cron, datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise UsageError(
                f"schedule.cron {self.cron!r} is not a cron expression ({error}). Write five fields, such as '0 3 * * *'."
            ) from None
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError):
            raise UsageError(
                f"schedule.timezone {self.timezone!r} is not a time zone. Write a name such as UTC or Europe/Paris."
            ) from None

    @classmethod
    def of(cls, schedule: Schedule) -> Timetable:
        """The timetable that a recipe's `schedule` section asks for."""
        return cls(schedule.every, schedule.cron, schedule.timezone)

    def next_due(self, anchor: datetime, after: datetime) -> datetime:
        """The first due moment that is later than `after`, in UTC.

        `anchor` is the start of the first interval; a cron expression needs none. Both carry a time zone.
        """
        if self.cron is not None:
            local = after.astimezone(ZoneInfo(self.timezone))
            # CronSim counts in local wall time; an ambiguous hour may hand back a moment that is not later.
            return next(due for moment in CronSim(self.cron, local) if (due := moment.astimezone(UTC)) > after)
        interval = timedelta(seconds=self.every_seconds)
        if after < anchor:
            return anchor.astimezone(UTC)
        return (anchor + ((after - anchor) // interval + 1) * interval).astimezone(UTC)

    def due_times(self, anchor: datetime, after: datetime, until: datetime) -> Iterator[datetime]:
        """Every due moment later than `after` and not later than `until`, in order."""
        due = self.next_due(anchor, after)
        while due <= until:
            yield due
            due = self.next_due(anchor, due)

    def __str__(self) -> str:
        if self.cron is not None:
            return f"cron: {self.cron} {self.timezone}"
        return f"interval: {format_hours(self.every_seconds)}"


def format_hours(seconds: float) -> str:
    """`24h`, `0.25h` for whole hundredths of an hour; other lengths as `90s` or `10m`."""
    hours = seconds / 3600
    return f"{hours:g}h" if round(hours, 2) == hours and hours > 0 else format_seconds(seconds)


def roughly(seconds: float) -> str:
    """A length of time to four digits, in its own unit: `23.21h`, `12.5m`, `40s`."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.4g}{unit}"
    return f"{seconds:.0f}s"
