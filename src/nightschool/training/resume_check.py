"""`python -m nightschool.training.resume_check --home H --run RUN_ID --steps N`: go on with a run for N steps, save, end.

The very code of a run, stopped after so many steps as by a signal. It publishes nothing, because it ends before the
run does; whoever starts it does so in a copy of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Interrupted, NightschoolError
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.training.distributed.launcher import started_ranks
from nightschool.training.distributed.world import joined_world
from nightschool.training.run import execute
from nightschool.work.stop import Stop


class StopAfter(Stop):
    """Stops a run after so many steps, or when a signal asks for it."""

    def __init__(self, num_steps: int, signals: Stop) -> None:
        super().__init__()
        self._steps_left = num_steps
        self._signals = signals

    @property
    def requested(self) -> bool:
        """The loop asks once before each step."""
        if self._signals.requested:
            self.reason = self._signals.reason
        elif self._steps_left == 0:
            self.reason = "The rehearsal"
        self._steps_left -= 1
        return self.reason is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Go on with the run that the command line names; return 0 when the steps are done and saved."""
    parser = argparse.ArgumentParser(
        prog="python -m nightschool.training.resume_check", description="Rehearse a resume."
    )
    parser.add_argument("--home", type=Path, required=True, help="a home that holds a copy of the run")
    parser.add_argument("--run", required=True, help="the id of the run")
    parser.add_argument("--steps", type=int, required=True, help="steps to train before saving")
    parser.add_argument("--root", type=Path, default=Path(), help="where relative paths of the recipe begin")
    given = parser.parse_args(arguments)
    with Stop() as signals:
        stop = StopAfter(given.steps, signals)
        try:
            home = Home(given.home.absolute())
            run = RunStore(home).get(given.run)
            root, count = given.root.absolute(), Recipe.model_validate(run.recipe()).train.num_processes
            with (
                started_ranks(home, run, root, count) as environment,
                joined_world(environment) as world,
                lock(run.lock_path, f"the run {run.id}"),
            ):
                # The other processes hear from this one which run it is, and when it stops.
                world.from_first(run.id)
                try:
                    execute(home, run, resume="latest", root=root, stop=stop, world=world)
                except Interrupted:
                    world.wait()
                    raise
        except Interrupted as error:
            if signals.reason is None:
                return 0
            return _complain(error)
        except NightschoolError as error:
            return _complain(error)
    print("error: the run came to its end. Rehearse fewer steps.", file=sys.stderr)  # noqa: T201
    return 1


def _complain(error: NightschoolError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
