"""The run or the checkpoint that a user named."""

from __future__ import annotations

import os
from pathlib import Path

from nightschool.errors import NotFound, UsageError
from nightschool.store import checkpoints
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore


def find_run(home: Home, wanted: str | None) -> Run:
    """The run of this id, `latest`, or with None the newest.

    Raises:
        NotFound: If there is no such run.
    """
    store = RunStore(home)
    if wanted is not None and wanted != "latest":
        return store.get(wanted)
    runs = store.ls()
    if not runs:
        raise NotFound(f"There are no runs in {home.runs} yet. Begin one with nightschool train RECIPE.")
    return runs[0]


def find_checkpoint(home: Home, wanted: str) -> tuple[Run, Checkpoint]:
    """A checkpoint by its folder, by `RUN/CHECKPOINT`, or by its name alone where one run has it.

    Raises:
        NotFound: If there is none.
        UsageError: If several runs have one of this name.
    """
    store = RunStore(home)
    given = Path(os.path.abspath(wanted))  # noqa: PTH100  the folder may be a link; its own name counts
    inside = store.containing(given)
    if inside is not None and given.parent == inside.checkpoints_path:
        run = store.get(inside.id)
        return run, checkpoints.get(run, given.name)
    run_id, slash, name = wanted.rpartition("/")
    if slash:
        run = store.get(run_id)
        return run, checkpoints.get(run, name)
    found = [(run, point) for run in store.ls() for point in checkpoints.ls(run) if point.name == wanted]
    if not found:
        raise NotFound(
            f"There is no checkpoint {wanted!r} in {home.runs}. List them with nightschool checkpoints ls RUN."
        )
    if len(found) > 1:
        runs = ", ".join(run.id for run, _ in found)
        raise UsageError(f"{len(found)} runs have a checkpoint {wanted}: {runs}. Write RUN/{wanted}.")
    return found[0]
