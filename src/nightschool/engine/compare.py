"""Ask a candidate and the champion the same questions, let the gate decide, and save its report.

    python -m nightschool.engine.compare --home H --run RUN_ID --candidate name@version [--champion name@version]
    python -m nightschool.engine.compare --home H --run RUN_ID [--champion name@version] --ahead

In the first night of a name, the base takes the champion's place. A process of its own, so that a server is not disturbed
and its bytes are given back. The report goes into the registry; the last line on standard output is one JSON object with
the decision. Exit code 0 whenever there is one, refused or not.

With `--ahead` it begins before there is a candidate: it asks the champion, and waits for a line on its standard input,
`{"candidate": "name@version", "champion": "name@version" or null}`. If the input ends without one, it ends as well.
An adapter is examined as soon as its files are written, while its run still proves and publishes them; what was found counts
if these very files were published.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nightschool.engine.comparison import Comparison
from nightschool.errors import NightschoolError
from nightschool.evaluation.verdict import GateReport
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.work.processes import live

LOOK_SECONDS = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.engine.compare", description="Examine a candidate.")
    parser.add_argument("--home", type=Path, required=True, help="the nightschool home")
    parser.add_argument("--run", required=True, help="the run that made the candidate")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--candidate", help="name@version")
    which.add_argument("--ahead", action="store_true", help="ask the champion, and wait for the candidate's name")
    parser.add_argument("--champion", help="name@version; left out, there is none yet, and the base takes its place")
    arguments = parser.parse_args(argv)
    home = Home(arguments.home)
    try:
        with Comparison(home, arguments.run) as comparison:
            named = arguments.candidate, arguments.champion
            if arguments.ahead:
                named = _candidate_told(comparison, arguments.champion)
            report = comparison.of(*named)
    except NightschoolError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    say_decision(home, report)
    return 0


def say_decision(home: Home, report: GateReport) -> None:
    """Write the last line of a comparison, for programs, on standard output."""
    candidate = Registry(home).resolve(report.candidate)
    last = {
        "decision": report.decision,
        "candidate": report.candidate,
        "champion": report.champion,
        "report": str(Registry(home).report_path(candidate.name, candidate.id)),
    }
    sys.stdout.write(f"{json.dumps(last)}\n")


def ask_ahead(comparison: Comparison, champion: str | None) -> None:
    """Ask the champion; that it cannot be asked now is only said."""
    try:
        comparison.ask_ahead(champion)
    except NightschoolError as error:  # what is wrong then as well fails the gate
        sys.stderr.write(f"The champion was not asked ahead: {error}\n")


def examine_ahead(comparison: Comparison) -> bool:
    """Examine what is not published yet, if it is there. Returns whether to stop looking for it."""
    try:
        return comparison.examine_ahead()
    except Exception as error:  # files that are not published may be anything
        sys.stderr.write(f"The candidate was not examined ahead: {error}\n")
        return True


def _candidate_told(comparison: Comparison, champion: str | None) -> tuple[str, str | None]:
    """Ask the champion, and return the names of both once somebody says them; ends this process if nobody ever will."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # nothing was written that would have to be put away
        lines.put(line)

    threading.Thread(target=listen, daemon=True).start()
    ask_ahead(comparison, champion)
    found = False
    while True:
        with suppress(queue.Empty):
            told = json.loads(lines.get(timeout=None if found else LOOK_SECONDS))
            return told["candidate"], told["champion"]
        found = examine_ahead(comparison)


if __name__ == "__main__":
    live(main)
