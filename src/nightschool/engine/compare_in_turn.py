"""The gate of several runs that train together: one process, and one base, for all their candidates, one after the other.

    python -m nightschool.engine.compare_in_turn --home H

Each line on standard input is a JSON object. `{"run": R, "root": PATH, "champion": "name@version" or null}` says that a
candidate of this run is expected: its champion is asked ahead, and an adapter is examined as soon as its files are written. With
`"candidate": "name@version"` beside, the candidate is there: the two are compared, and what is said of it goes into the log of
the run, and its end into `gate.json` there. The process ends with its input. An error of one run is none of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.engine.compare import LOOK_SECONDS, ask_ahead, examine_ahead, say_decision
from nightschool.engine.comparison import NUM_ROWS, Comparison
from nightschool.engine.local_model import local_pool
from nightschool.engine.pool import EnginePool
from nightschool.errors import NightschoolError
from nightschool.store.atomic import write_json
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.work.processes import live


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the lines name, until there are no more. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nightschool.engine.compare_in_turn", description="Examine candidates."
    )
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    home = Home(parser.parse_args(argv).home)
    in_turn = InTurn(home, local_pool(home, num_rows=NUM_ROWS))
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        while line := sys.stdin.readline():
            lines.put(line)
        os._exit(0)  # nobody waits for anything any more, and nothing was written that would have to be put away

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            in_turn.take(json.loads(lines.get(timeout=None if in_turn.is_idle else LOOK_SECONDS)))
        except queue.Empty:
            in_turn.go_on()


@dataclass
class _Expected:
    """A run whose candidate is not there yet. `champion` is asked, and `files` are looked for, as long as that is to be done."""

    run: Run
    comparison: Comparison
    champion: str | None
    is_asked: bool = False
    is_examined: bool = False


class InTurn:
    """The comparisons of several runs on what stands in one pool."""

    def __init__(self, home: Home, pool: EnginePool) -> None:
        self._home = home
        self._pool = pool
        self._expected: dict[str, _Expected] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be done before somebody says something."""
        return all(one.is_asked and one.is_examined for one in self._expected.values())

    def take(self, told: dict[str, Any]) -> None:
        """Do what a line says, or note it."""
        try:
            run = RunStore(self._home).get(told["run"])
        except NightschoolError as error:  # it was removed; whoever waits for it sees that, too
            sys.stderr.write(f"{error}\n")
            return
        candidate = told.get("candidate")
        with _writing_into(run):
            try:
                if run.id not in self._expected:
                    comparison = Comparison(self._home, run.id, root=Path(told["root"]), pool=self._pool)
                    self._expected[run.id] = _Expected(run, comparison, told["champion"])
                if candidate is not None:
                    one = self._expected.pop(run.id)
                    with one.comparison:
                        say_decision(self._home, one.comparison.of(candidate, told["champion"]))
                    _note_end(run, 0, None)
            except Exception as error:  # of one run, and none of the others
                is_ours = isinstance(error, NightschoolError)
                sys.stderr.write(f"{error}\n" if is_ours else traceback.format_exc())
                if candidate is not None:
                    _note_end(run, error.exit_code if isinstance(error, NightschoolError) else 1, str(error))

    def go_on(self) -> None:
        """Examine one candidate ahead whose files are there, or else ask one champion."""
        for one in self._expected.values():
            if one.is_asked and not one.is_examined:
                with _writing_into(one.run):
                    one.is_examined = examine_ahead(one.comparison)
                if one.is_examined:
                    return
        waiting = next((one for one in self._expected.values() if not one.is_asked), None)
        if waiting is not None:
            with _writing_into(waiting.run):
                ask_ahead(waiting.comparison, waiting.champion)
            waiting.is_asked = True


def _note_end(run: Run, exit_code: int, error: str | None) -> None:
    write_json(run.gate_path, {"exit_code": exit_code, "error": error})


@contextmanager
def _writing_into(run: Run) -> Iterator[None]:
    """A block in which whatever is printed is a line of the run's log."""
    with run.log_path.open("a", buffering=1, encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


if __name__ == "__main__":
    live(main)
