"""The run or the checkpoint that a user named."""

from __future__ import annotations

import os
from pathlib import Path

from nightschool.errors import NotFound, UsageError
from nightschool.store import checkpoints
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore


def find_run_or_checkpoint(home: Home, wanted: str | None) -> tuple[Run, Checkpoint | None]:
    """The run of this id, or the newest with None or `latest`; else a checkpoint with its run.

    Raises:
        NotFound: If there is none.
        UsageError: If several runs have a checkpoint of this name.
    """
    store = RunStore(home)
    if wanted is None or wanted == "latest" or wanted in [run.id for run in store.ls()]:
        return store.find(wanted), None
    return find_checkpoint(home, wanted)


def find_checkpoint(home: Home, wanted: str) -> tuple[Run, Checkpoint]:
    """A checkpoint by its folder, by `RUN/CHECKPOINT` or `RUN/STEP`, or by its name alone where one run has it.

    A step alone is one of the newest run.

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
    if slash or wanted.isdecimal():
        run = store.get(run_id) if slash else store.find(None)
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
