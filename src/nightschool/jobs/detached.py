"""`python -m nightschool.jobs.detached --home H --run RUN_ID [--resume CHECKPOINT]`: a cycle that nobody waits for.

`--lock` is the descriptor of the lock of the cycle, which whoever starts this hands over.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nightschool.errors import Interrupted, NightschoolError
from nightschool.jobs.cycle import continue_cycle
from nightschool.jobs.launch import CycleContext
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.units import printable


def main(arguments: list[str] | None = None) -> int:
    """Do the rest of a cycle that was begun. Prints into the run's own log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--lock", type=int, default=None)
    given = parser.parse_args(arguments)
    home = Home(given.home)
    try:
        result = continue_cycle(
            home, given.run, resume=given.resume, around=CycleContext(on_news=print), held_lock=given.lock
        )
    except NightschoolError as error:
        _never_began(home, given.run, error)
        print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201  stdout and stderr are the log of the run
        return error.exit_code
    print(f"{result.outcome}: {printable(result.detail)}")  # noqa: T201
    return result.exit_code


def _never_began(home: Home, run_id: str, error: NightschoolError) -> None:
    """A run that still waits will never begin: its status says why, for whoever looks for it later."""
    try:
        run = RunStore(home).get(run_id)
        if run.status.state == "queued":
            state = "interrupted" if isinstance(error, Interrupted) else "cancelled"
            run.update_status(state=state, error=str(error), exit_code=error.exit_code)
    except NightschoolError as second:
        print(f"error: {printable(str(second))}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
