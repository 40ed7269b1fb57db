"""`python -m nightschool.jobs.detached --home H --run RUN_ID [--resume CHECKPOINT]`: a cycle that nobody waits for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nightschool.errors import NightschoolError
from nightschool.jobs.cycle import Surroundings, continue_cycle
from nightschool.store.home import Home


def main(arguments: list[str] | None = None) -> int:
    """Do the rest of a cycle that was begun. Prints into the run's own log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--resume", default=None)
    given = parser.parse_args(arguments)
    home = Home(given.home)
    try:
        result = continue_cycle(home, given.run, resume=given.resume, around=Surroundings(on_news=print))
    except NightschoolError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  stdout and stderr are the log of the run
        return error.exit_code
    print(f"{result.outcome}: {result.detail}")  # noqa: T201
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
