"""From a recipe to a run that is ready for step 1, in each of the processes that train it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Damaged
from nightschool.feedback.selection import Selection, read_selection, select_examples, select_shards, write_selection
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.environment import rerun_of
from nightschool.training.methods.pretrain import prepare_pretraining
from nightschool.training.setup import PreparedRun, prepare_finetune


def prepare(
    home: Home,
    run: Run,
    recipe: Recipe,
    *,
    root: Path,
    point: Checkpoint | None,
    world: World = ALONE,
) -> PreparedRun:
    """Everything before step 1, from the data that were selected for the run.

    A cycle has selected them before the run's first process started. Where none did, process 0 does, once.

    Args:
        home: Where runs and versions are.
        run: The run.
        recipe: Its recipe.
        root: Where relative paths of the recipe begin.
        point: The checkpoint to go on from.
        world: The processes that train together; all of them call this.

    Raises:
        Damaged: If the data are no longer those that were selected.
    """
    rerun = rerun_of(point.path) if point else None
    if recipe.method == "pretrain":
        begins = point is None or read_selection(run.path) is None
        selection = _selected_shards(run, recipe, root) if world.is_first and begins else None
        prepared = prepare_pretraining(recipe, home, root=root, rerun=rerun, world=world)
        if selection is not None:
            write_selection(run.path, replace(selection, held_out=prepared.held_out_texts()))
        return prepared
    tokenizer_folder = run.path / "tokenizer"
    with world.first_goes_first():
        selection = read_selection(run.path)
        if selection is None:
            selection = select_examples(recipe, home, root)
            shutil.rmtree(tokenizer_folder, ignore_errors=True)  # made from an earlier selection that was lost
            write_selection(run.path, selection)
    return prepare_finetune(
        recipe, selection, home, root=root, tokenizer_folder=tokenizer_folder, rerun=rerun, world=world
    )


def _selected_shards(run: Run, recipe: Recipe, root: Path) -> Selection:
    """The shards as they are. Later, each checkpoint knows which ones it was trained on.

    Raises:
        Damaged: If they are not those that were selected for the run.
    """
    selected, now = read_selection(run.path), select_shards(recipe, root)
    if selected is not None and selected.shards not in (None, now.shards):
        raise Damaged(
            f"The token shards at {recipe.data[0].path} have changed since they were selected for the run {run.id}. "
            "Begin a new run."
        )
    return now
