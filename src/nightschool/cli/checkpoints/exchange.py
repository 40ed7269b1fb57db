"""`nightschool checkpoints export` and `import`: training state to and from the layouts of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from nightschool.cli.lookup import find_checkpoint
from nightschool.cli.output import answer
from nightschool.cli.recipes import read_recipe
from nightschool.errors import NightschoolError, NothingToTrain
from nightschool.jobs.beginning import begin_cycle
from nightschool.jobs.cycle import cycle_lock_path
from nightschool.jobs.outcome import CycleResult, root_of
from nightschool.store.atomic import folder_bytes
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.units import format_bytes


def export(checkpoint: str, folder: Path, /, *, layout: Literal["huggingface", "accelerate"] = "huggingface") -> None:
    """Write a checkpoint as a folder of your own that other programs load.

    As `huggingface` it holds the weights, which transformers (or PEFT) loads; it is loaded again and compared with the
    checkpoint, bit by bit, before it appears. As `accelerate` it holds weights, optimizer, scheduler and random state, which
    accelerate's load_state takes.

    Args:
        checkpoint: Its folder, RUN/CHECKPOINT, or its name.
        folder: A folder that does not exist yet.
        layout: Whose files.
    """
    home = Home.find()
    run, point = find_checkpoint(home, checkpoint)
    target = folder.absolute()
    root = root_of(run)
    data: dict[str, Any] = {"run_id": run.id, "name": point.name, "path": str(target), "layout": layout}
    proof = ""
    if layout == "accelerate":
        from nightschool.training.checkpoint.accelerate_layout import export_accelerate

        export_accelerate(home, run, point, target, root=root)
    else:
        from nightschool.training.checkpoint.export import export_checkpoint

        data["logits_difference"] = export_checkpoint(home, run, point, target, root=root)
        proof = "; loaded again, it is the same model"
    size = folder_bytes(target)
    answer(
        data | {"size_bytes": size},
        f"Exported {point.name} of {run.id} to {folder} ({format_bytes(size)}){proof}.",
        quiet=str(folder),
    )


def import_(source: Path, recipe: Path, /, *overrides: str) -> None:
    """Make a run that goes on from a checkpoint in accelerate's layout: a folder, or a .tar.gz of one.

    Weights must fit the recipe's model by every name and shape. What is missing besides, and so begins anew, is named.

    Args:
        source: The folder or the archive.
        recipe: A recipe file for the rest of the training.
        overrides: Settings, as train.max_steps=10000.
    """
    from nightschool.training.checkpoint.accelerate_layout import import_accelerate

    home = Home.find()
    settings = read_recipe(recipe, overrides)
    with lock(cycle_lock_path(home, settings.name), f"a cycle of {settings.name}"):
        run = begin_cycle(home, settings, trigger="manual", root=Path.cwd())
        if isinstance(run, CycleResult):
            raise NothingToTrain(f"There is {run.detail}. Correct the recipe's data, then import again.")
        try:
            done = import_accelerate(home, run, source.absolute(), root=Path.cwd())
        except NightschoolError:
            RunStore(home).remove(run.id)
            raise
    lines = [
        f"Imported {source} into the run {run.id} at step {done.step}",
        *(f"begins anew: {line}" for line in done.missing),
        f"go on with nightschool train --resume {run.id}",
    ]
    answer(
        {"run_id": run.id, "name": done.checkpoint.name, "step": done.step, "began_anew": done.missing},
        "\n".join(lines),
        quiet=run.id,
    )
