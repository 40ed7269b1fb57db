"""The scheduler: a cycle at once, then one whenever the recipe's timetable says, until a signal comes.

The ledger in the database is the truth: every cycle is entered before it begins and again when it ends, so that the
next start knows what was left undone. The clock is handed in, and `stop` does the waiting, so that a test lives
through a year in a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Interrupted, Locked, NightschoolError, NotFound
from nightschool.events import now
from nightschool.feedback.skipping import PreviousCycle
from nightschool.jobs.cycle import continue_cycle, run_cycle
from nightschool.jobs.launch import CycleContext
from nightschool.jobs.outcome import CycleRecord, CycleResult, Trigger, verdict_of
from nightschool.jobs.schedule import Timetable, roughly
from nightschool.store.atomic import FULL
from nightschool.store.home import Home
from nightschool.store.ledger import Cycle, Ledger
from nightschool.store.locks import lock
from nightschool.store.names import lock_path, stamp_of
from nightschool.store.runs import Run, RunStore
from nightschool.work.stop import Stop

# A cycle that begins later than this was missed, as when the machine slept, and not merely late.
LATE = timedelta(minutes=2)
# The clock of a machine can be set, and a machine can sleep: look at it at least this often.
LONGEST_NAP_SECONDS = 60.0

FINISHED = ("promoted", "published", "refused")


@dataclass(frozen=True)
class DueCycle:
    """A moment at which a cycle is due, and why."""

    due_at: datetime
    trigger: Trigger


class Scheduler:
    """Runs the cycles of one recipe, one at a time.

    `load` reads the recipe anew before every cycle, so that an edit counts from the next night on. `say` gets the
    lines of the log.
    """

    def __init__(
        self,
        home: Home,
        load: Callable[[], Recipe],
        *,
        ledger: Ledger,
        root: Path,
        stop: Stop,
        say: Callable[[str], None] = print,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self._home = home
        self._load = load
        self._root = root
        self._stop = stop
        self._now = clock
        self._write_line = say
        self._recipe = load()
        self._timetable = Timetable.of(self._recipe.schedule)
        self._ledger = ledger
        self._last_outcome: str | None = None
        # Cycles that have ended and whose end the ledger could not take yet.
        self._unentered: list[tuple[int, CycleResult]] = []

    @property
    def name(self) -> str:
        return self._recipe.name

    def serve(self) -> int:
        """Run until a signal comes. Returns 75 if it interrupted a cycle, else 0.

        Raises:
            Locked: If another scheduler keeps this name's ledger.
        """
        with self._stop, lock(schedule_lock_path(self._home, self.name), f"the schedule of {self.name}"):
            self._say(f"[Scheduler] Starting scheduled training ({self._timetable})")
            night, anchor = self._first_night()
            while not self._stop.requested:
                if self._wait_until(night.due_at):
                    break
                night = self._settle_lateness(night, anchor)
                if night.due_at > self._now():
                    continue
                self._cycle(night)
                if self._stop.requested:
                    break
                night = self._next_night(night, anchor)
            self._say("[Scheduler] Stopped")
        return Interrupted.exit_code if self._last_outcome == "interrupted" else 0

    def _first_night(self) -> tuple[DueCycle, datetime]:
        """What comes first, and the anchor from which intervals count."""
        moment = self._now()
        undone = self._undone()
        if undone is not None:
            if self._resume(undone, moment):
                return DueCycle(self._timetable.next_due(moment, self._now()), "due"), moment
            return DueCycle(self._now(), "start"), moment
        before = self._ledger.last(self.name)
        if before is None:
            return DueCycle(moment, "start"), moment
        missed = self._timetable.next_due(before.due_at, before.due_at) <= moment
        if self._recipe.schedule.missed == "skip":
            return DueCycle(self._timetable.next_due(before.due_at, moment), "due"), before.due_at
        return DueCycle(moment, "catch_up" if missed else "start"), moment

    def _wait_until(self, due_at: datetime) -> bool:
        """Sleep until `due_at`; True if a stop was requested."""
        left = (due_at - self._now()).total_seconds()
        if left > 0:
            self._say(f"[Scheduler] Waiting {roughly(left)} for next training (at {due_at:%Y-%m-%d %H:%M:%S} UTC)")
        while left > 0:
            if self._stop.wait(min(left, LONGEST_NAP_SECONDS)):
                return True
            left = (due_at - self._now()).total_seconds()
        return self._stop.requested

    def _settle_lateness(self, night: DueCycle, anchor: datetime) -> DueCycle:
        """A night that comes far too late was missed: it is caught up once, or skipped, as the recipe says."""
        moment = self._now()
        if night.trigger != "due" or moment - night.due_at <= LATE:
            return night
        missed = 1 + sum(1 for _ in self._timetable.due_times(anchor, night.due_at, moment))
        since = f"[Scheduler] Missed {missed} trainings since {night.due_at:%Y-%m-%d %H:%M:%S} UTC"
        if self._recipe.schedule.missed == "run_once":
            self._say(f"{since}: catching up once")
            return DueCycle(night.due_at, "catch_up")
        self._say(f"{since}: skipped")
        self._skip(night, f"missed {missed} times while nobody was there; schedule.missed is skip")
        return DueCycle(self._timetable.next_due(anchor, moment), "due")

    def _next_night(self, night: DueCycle, anchor: datetime) -> DueCycle:
        """The first due moment that is still to come; those that passed while a cycle ran are skipped."""
        moment = self._now()
        self._reload_timetable()
        if night.trigger == "due":
            passed = list(self._timetable.due_times(anchor, night.due_at, moment))
            if passed:
                self._say(f"[Scheduler] Skipped {len(passed)} trainings that fell due while one ran")
                detail = f"overlap: {len(passed)} fell due while the cycle of {night.due_at:%Y-%m-%d %H:%M:%S} UTC ran"
                self._skip(DueCycle(passed[-1], "due"), detail)
        return DueCycle(self._timetable.next_due(anchor, moment), "due")

    def _reload_timetable(self) -> None:
        try:
            self._recipe = self._same_name(self._load())
            self._timetable = Timetable.of(self._recipe.schedule)
        except (NightschoolError, OSError) as error:
            self._say(f"[Scheduler] The recipe cannot be read, so the timetable stays as it was: {error}")

    def _same_name(self, recipe: Recipe) -> Recipe:
        if recipe.name != self.name:
            raise Conflict(
                f"The recipe's name is now {recipe.name}, and this scheduler keeps {self.name}. "
                "Start a scheduler of its own for the new name."
            )
        return recipe

    def _cycle(self, night: DueCycle) -> None:
        """One cycle, entered in the ledger."""
        if self._is_paused():
            self._say("[Scheduler] Paused: skipping this training (nightschool schedule resume)")
            self._skip(night, "paused")
            return
        cycle = self._begin(night)
        if cycle is not None:
            self._entered(cycle, lambda: self._begin_new(night))

    def _begin(self, night: DueCycle) -> int | None:
        """Enter a cycle; None if the ledger has it already, as after the machine's clock was set back.

        None also if it cannot be written: on a full disk nothing could be trained either. The next due time tries again.
        """
        self._enter_what_waits()
        try:
            return self._ledger.begin(self.name, night.due_at, night.trigger)
        except Conflict as error:
            self._say(f"[Scheduler] Skipped: {error}")
        except (NightschoolError, OSError) as error:
            self._say(f"[Error] Skipped, and tried again at the next due time: the ledger cannot be written: {error}")
        return None

    def _end(self, cycle_id: int, result: CycleResult) -> None:
        """Enter how a cycle ended; what the ledger cannot take now is kept, and entered before the next begins."""
        self._unentered.append((cycle_id, result))
        self._enter_what_waits()

    def _enter_what_waits(self) -> None:
        while self._unentered:
            cycle_id, result = self._unentered[0]
            try:
                self._ledger.finish(
                    cycle_id,
                    result.outcome,
                    result.detail,
                    run_id=result.run_id,
                    candidate=result.candidate,
                    data_fingerprint=result.data_fingerprint,
                )
            except (Conflict, NotFound) as error:  # somebody else has settled it, and it stays as that one said
                self._say(f"[Scheduler] {error}")
            except (NightschoolError, OSError) as error:
                self._say(f"[Error] The end of a cycle ({result.outcome}) cannot be entered yet: {error}")
                return
            self._unentered.pop(0)

    def _is_paused(self) -> bool:
        try:
            return self._ledger.paused(self.name)
        except (NightschoolError, OSError) as error:
            self._say(f"[Error] Whether {self.name} is paused cannot be read: {error}")
            return False

    def _say(self, text: str) -> None:
        """One line of the log; the log may lie on the very disk that is full, and the nights must go on."""
        try:
            self._write_line(text)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _begin_new(self, night: DueCycle) -> CycleResult:
        return run_cycle(
            self._home,
            self._same_name(self._load()),
            trigger=night.trigger,
            root=self._root,
            previous=self._previous(),
            around=self._around(),
        )

    def _resume(self, run_id: str, moment: datetime) -> bool:
        """Go on with what was left undone. False if that failed, so that a new cycle should begin."""
        self._say(f"[Scheduler] Going on with the run {run_id}, which was interrupted")
        cycle = self._begin(DueCycle(moment, "resume"))
        if cycle is None:
            return False
        result = self._entered(cycle, lambda: continue_cycle(self._home, run_id, around=self._around()))
        return result.outcome != "failed"

    def _entered(self, cycle_id: int, work: Callable[[], CycleResult]) -> CycleResult:
        """Do the work and enter its outcome, whatever happens: the scheduler outlives a failed night."""
        try:
            result = work()
        except Interrupted as error:
            result = CycleResult("interrupted", str(error))
        except Locked as error:
            result = CycleResult("skipped", str(error))
        except Exception as error:  # a mistake of one night must not end all the later ones
            result = CycleResult("failed", str(error) or type(error).__name__)
        self._last_outcome = result.outcome
        self._end(cycle_id, result)
        head = "[Error] Training failed" if result.outcome == "failed" else f"[Scheduler] {result.outcome.capitalize()}"
        self._say(f"{head}: {result.detail}")
        return result

    def _around(self) -> CycleContext:
        return CycleContext(on_line=self._say, on_news=self._say, stop=self._stop, machine="shared")

    def _skip(self, night: DueCycle, detail: str) -> None:
        cycle = self._begin(night)
        if cycle is not None:
            self._end(cycle, CycleResult("skipped", detail))

    def _previous(self) -> PreviousCycle | None:
        """What the last cycle that came to a verdict had before it."""
        for cycle in self._ledger.ls(self.name):
            if cycle.outcome in FINISHED and cycle.data_fingerprint is not None:
                return PreviousCycle(cycle.data_fingerprint, cycle.outcome)
        return None

    def _undone(self) -> str | None:
        """The newest run if its cycle came to no verdict, because whoever was at it was stopped or killed.

        The run says so itself: the ledger may lack the end of its cycle, and further cycles may have been skipped since.
        """
        newest = next((run for run in RunStore(self._home).ls() if run.name == self.name), None)
        verdict = None if newest is None else verdict_of(newest)
        for cycle in self._ledger.ls(self.name):
            if cycle.outcome is None:
                run = newest if newest is not None and _belongs(newest, cycle) else None
                cut_short = CycleResult(
                    "interrupted", "the scheduler ended in the middle of it", run_id=run.id if run else None
                )
                self._end(cycle.id, verdict if run and verdict else cut_short)
        if newest is None or verdict is not None or newest.status.state == "cancelled":
            return None
        try:
            trigger = CycleRecord.read(newest).trigger
        except NotFound:
            return None
        # Training that somebody began by hand and stopped is theirs to resume; a finished candidate is examined.
        return newest.id if trigger != "manual" or newest.status.candidate is not None else None


def _belongs(run: Run, cycle: Cycle) -> bool:
    """Whether a cycle without an end was at this run, the newest of its name."""
    return cycle.trigger == "resume" or run.id.rpartition("-")[2] >= stamp_of(cycle.started_at)


def schedule_lock_path(home: Home, name: str) -> Path:
    return lock_path(home, "schedule", name)
