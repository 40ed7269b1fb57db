"""From a recipe to a run that is ready for step 1, in each of the processes that train it."""

from __future__ import annotations

import shutil
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.environment import rerun_of
from nightschool.training.methods.pretrain import prepare_pretraining
from nightschool.training.selection import Selection, read_selection, select_examples, write_selection
from nightschool.training.setup import PreparedRun, prepare_finetune


def prepare(
    home: Home,
    run: Run,
    recipe: Recipe,
    *,
    root: Path,
    resuming: bool,
    point: Checkpoint | None,
    world: World = ALONE,
) -> PreparedRun:
    """Everything before step 1. What process 0 decided at the first start, the others and resumed runs read.

    Args:
        home: Where runs and versions are.
        run: The run.
        recipe: Its recipe.
        root: Where relative paths of the recipe begin.
        resuming: Whether the examples that an earlier process of the run chose are taken again.
        point: The checkpoint to go on from.
        world: The processes that train together; all of them call this.
    """
    rerun = rerun_of(point.path) if point else None
    if recipe.method == "pretrain":
        prepared = prepare_pretraining(recipe, home, root=root, rerun=rerun, world=world)
        if world.is_first and (not resuming or read_selection(run.path) is None):
            write_selection(run.path, Selection(new=[], replayed=[], held_out=prepared.held_out_texts()))
        return prepared
    tokenizer_folder = run.path / "tokenizer"
    with world.first_goes_first():
        selection = read_selection(run.path) if resuming or not world.is_first else None
        if selection is None:
            selection = select_examples(recipe, home, root)
            shutil.rmtree(tokenizer_folder, ignore_errors=True)  # of an attempt that failed, with other examples
            write_selection(run.path, selection)
    return prepare_finetune(
        recipe, selection, home, root=root, tokenizer_folder=tokenizer_folder, rerun=rerun, world=world
    )
