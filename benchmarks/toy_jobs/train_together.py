"""Trains several runs in turn in one process; each that ends, or is asked to, leaves the others alone."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.toy_jobs.train import SECONDS_PER_STEP, train

from nightschool.errors import Interrupted, Locked
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.work.stop import Stop


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--home", "--members"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    store = RunStore(Home(given.home))
    with Stop() as stop:
        runs = [store.get(one["run"]) for one in json.loads(given.members.read_text())]
        at_work = [(run, train(run, stopped(run, stop), shares=True)) for run in runs]
        while at_work:
            at_work = [(run, steps) for run, steps in at_work if goes_on(run, steps)]
            stop.wait(SECONDS_PER_STEP)
        return Interrupted.exit_code if stop.requested else 0


def stopped(run: Run, stop: Stop):
    return lambda: stop.requested or run.stop_request is not None


def goes_on(run: Run, steps) -> bool:
    """Take a step of a run. False if it has ended."""
    try:
        next(steps)
    except StopIteration:
        run.clear_stop()
        return False
    except Locked:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
