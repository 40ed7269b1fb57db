"""A run that goes on from a checkpoint of another one for another number of epochs or steps.

A resumed run keeps its recipe, and one that has published stays what it published. So another length makes another run,
with the data that were selected for the first, and a copy of the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.errors import Damaged, UsageError
from nightschool.feedback.selection_files import read_selection, write_selection
from nightschool.feedback.written_forms import read_written, write_written
from nightschool.jobs.outcome import CycleRecord
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.runs import Run, RunStore

LENGTHS = ("train.epochs", "train.max_steps")


def lengthened(run: Run, point: Checkpoint, lengths: Mapping[str, Any]) -> Run:
    """Make the run that goes on from `point` of `run`.

    Args:
        run: The run so far.
        point: One of its checkpoints.
        lengths: Values of `LENGTHS`, by their keys.

    Raises:
        UsageError: If a length is none, or was reached in the checkpoint.
        Damaged: If the data of the run are not whole.
    """
    plain = run.recipe()
    train = plain["train"] | {key.removeprefix("train."): value for key, value in lengths.items()}
    recipe = Recipe.model_validate(plain | {"train": train})
    reached, wanted = (
        (f"step {point.step}", recipe.train.max_steps)
        if recipe.train.max_steps
        else (f"epoch {point.epoch}", recipe.train.epochs)
    )
    if int(reached.split()[1]) >= wanted:
        what = "train.max_steps" if recipe.train.max_steps else "train.epochs"
        raise UsageError(f"{what} is {wanted}, and {point.name} has reached {reached} already. Write more.")
    selection = read_selection(run.path)
    if selection is None:
        raise Damaged(f"The run {run.id} has no whole selection of data to go on with. Start a new run.")
    made = RunStore(run.home).create(recipe.as_plain(), name=run.name)
    write_selection(made.path, selection)
    written = read_written(run.path)
    if written is not None:
        write_written(made.path, written)
    if run.metrics_path.is_file():
        shutil.copyfile(run.metrics_path, made.metrics_path)
    with publish_directory(made.checkpoints_path / point.name) as partial:
        shutil.copytree(point.path, partial, dirs_exist_ok=True)
    replace(CycleRecord.read(run), trigger="resume").write(made)
    return made
