"""`nightschool schedule`: train again and again, on time."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from nightschool.cli.formatting import moment
from nightschool.cli.output import answer, let_children_colour, session, table
from nightschool.cli.recipes import read_recipe
from nightschool.config.recipe import Recipe
from nightschool.events import now
from nightschool.jobs.schedule import Timetable
from nightschool.jobs.scheduler import Scheduler, schedule_lock_path
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.locks import is_held
from nightschool.store.names import check_full_name
from nightschool.units import printable
from nightschool.work.stop import Stop


def run(recipe: Path, /, *overrides: str) -> int:
    """Train at once, then whenever the recipe's schedule says, until SIGTERM or Ctrl-C.

    A cycle without new data is skipped. A cycle that is interrupted goes on at the next start. The recipe is read
    anew before each cycle.

    Args:
        recipe: A recipe file.
        overrides: Settings, as schedule.every=12h.
    """
    root = Path.cwd()

    def load() -> Recipe:
        return read_recipe(recipe, overrides)

    # With --json the log is not the answer: it goes beside it.
    stream = sys.stderr if session().json else sys.stdout

    def say(line: str) -> None:
        if not session().quiet or line.startswith(("[Scheduler]", "[Error]")):
            print(printable(line, colours=True), file=stream, flush=True)

    let_children_colour()
    stop = Stop()
    home = Home.find()
    return Scheduler(home, load, ledger=Ledger(home.database), root=root, stop=stop, say=say).serve()


def ls(name: str | None = None, /, *, limit: int = 20) -> None:
    """List the cycles of a schedule, newest first.

    Args:
        name: Only cycles of this name.
        limit: At most this many of a name.
    """
    home = Home.find()
    ledger = Ledger(home.database)
    names = [check_full_name(name)] if name is not None else ledger.names()
    cycles = [cycle for one in names for cycle in ledger.ls(one, limit=limit)]
    states = {one: {"running": is_held(schedule_lock_path(home, one)), "paused": ledger.paused(one)} for one in names}
    rows = [dataclasses.asdict(cycle) for cycle in cycles]

    def text() -> str:
        if not rows:
            return "No cycles yet. Start with nightschool schedule run RECIPE."
        lines = [
            f"{one}: {'a scheduler is running' if state['running'] else 'no scheduler is running'}"
            + (", paused" if state["paused"] else "")
            for one, state in states.items()
        ]
        columns = ("NAME", "DUE", "WHY", "OUTCOME", "RUN", "DETAIL")
        keys = ("name", "due_at", "trigger", "outcome", "run_id", "detail")
        body = [[moment(row[key]) if key == "due_at" else row[key] for key in keys] for row in rows]
        return "\n".join([*lines, "", table(columns, body)])

    answer(
        {"schedules": states, "cycles": rows},
        text,
        quiet=lambda: "\n".join(row["outcome"] or "running" for row in rows),
    )


def next_due(recipe: Path, /, *overrides: str, count: int = 3) -> None:
    """Show when the next cycles fall due, and what the last one did.

    Args:
        recipe: A recipe file.
        overrides: Settings, as schedule.every=12h.
        count: How many due times to show.
    """
    home = Home.find()
    settings = read_recipe(recipe, overrides)
    timetable = Timetable.of(settings.schedule)
    ledger = Ledger(home.database)
    last, paused = ledger.last(settings.name), ledger.paused(settings.name)
    running = is_held(schedule_lock_path(home, settings.name))
    moments = list(_due(timetable, last.due_at if last else now(), max(1, count)))
    data = {
        "name": settings.name,
        "timetable": str(timetable),
        "running": running,
        "paused": paused,
        "due_at": moments,
        "last": dataclasses.asdict(last) if last else None,
    }

    def text() -> str:
        lines = [f"{settings.name}: {timetable}" + (", paused" if data["paused"] else "")]
        if not running:
            lines.append(
                f"No scheduler is running: a cycle begins at once with nightschool schedule run {recipe}. "
                "If it had gone on:"
            )
        lines += [f"  {one:%Y-%m-%d %H:%M:%S} UTC" for one in moments]
        if last:
            lines.append(f"last: {moment(last.due_at)} UTC {last.outcome or 'running'}: {last.detail or ''}")
        return "\n".join(lines)

    answer(data, text, quiet=lambda: "\n".join(one.isoformat() for one in moments))


def pause(name: str = "default", /) -> None:
    """Let no cycle of a name begin until resumed. One that runs goes on.

    Args:
        name: The name.
    """
    Ledger(Home.find().database).pause(name)
    answer({"name": name, "paused": True}, f"Paused {name}: cycles that fall due are skipped.", quiet=name)


def resume(name: str = "default", /) -> None:
    """Let cycles of a name begin again, from the next due time on.

    Args:
        name: The name.
    """
    Ledger(Home.find().database).resume(name)
    answer({"name": name, "paused": False}, f"Resumed {name}.", quiet=name)


def _due(timetable: Timetable, anchor: datetime, count: int) -> Iterator[datetime]:
    due = now()
    for _ in range(count):
        due = timetable.next_due(anchor, due)
        yield due
