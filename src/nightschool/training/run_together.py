"""Several runs in one process, on one base in memory: `python -m nightschool.training.run_together --home H --members FILE`.

FILE is JSON: `[{"run": ID, "resume": CHECKPOINT | "latest" | null, "root": PATH}, …]`. To everybody else each run is what
it is in a process of its own: it has its lock, status, log, checkpoints, its end and its exit code, in status.json. One
that fails or is asked to stop (`Run.request_stop`) leaves, and the others go on. A signal stops all.

The exit code is 0 when all have ended, however each did, 75 after a signal, and 130 after a second one.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # MKL keeps buffers for each thread that ever multiplied, 24 MB a member; it is asked before torch loads it.
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    from nightschool.work.heap import share_one_heap

    share_one_heap()  # before the first thread of numpy or torch has a heap of its own

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nightschool.errors import Interrupted, NightschoolError, UsageError
from nightschool.models.resident import ResidentBases
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.training.run import complain
from nightschool.training.together.joint import JointPasses
from nightschool.training.together.member import Member, work_together
from nightschool.work.processes import live
from nightschool.work.stop import Stop


@dataclass(frozen=True)
class Named:
    """A run to train, the checkpoint to go on from, and where relative paths of its recipe begin."""

    run: str
    resume: str | None
    root: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the file names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nightschool.training.run_together", description="Train runs together."
    )
    parser.add_argument("--home", type=Path, required=True, help="the home that holds the runs")
    parser.add_argument("--members", type=Path, required=True, help="the file that names the runs")
    given = parser.parse_args(arguments)
    with Stop() as stop:
        try:
            members = _members(Home(given.home.absolute()), read_members(given.members), stop)
        except NightschoolError as error:
            return complain(error, error.exit_code)
        work_together(members, JointPasses().serve)
        interrupted = any(member.code == Interrupted.exit_code for member in members)
        return Interrupted.exit_code if stop.requested and interrupted else 0


def _members(home: Home, names: Sequence[Named], stop: Stop) -> list[Member]:
    """The runs that are there; one that is not is nobody else's affair."""
    store, bases, members = RunStore(home), ResidentBases(), []
    for one in names:
        try:
            members.append(Member(store.get(one.run), one.resume, one.root, stop=stop, bases=bases))
        except NightschoolError as error:
            complain(error, error.exit_code)
    return members


def read_members(path: Path) -> list[Named]:
    """What the file names.

    Raises:
        UsageError: If it is not such a file.
    """
    try:
        return [
            Named(str(one["run"]), one.get("resume"), Path(one["root"]).absolute())
            for one in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} does not name runs to train together: {error!r}.") from None


if __name__ == "__main__":
    live(main)
