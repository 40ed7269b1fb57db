"""The weights of a checkpoint as a plain Hugging Face or PEFT folder, without publishing them."""

from __future__ import annotations

from pathlib import Path

from nightschool.errors import NotFound
from nightschool.feedback.selection_files import read_selection
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.training.checkpoint.full_state import load_weights
from nightschool.training.run import prepare


def export_checkpoint(home: Home, run: Run, point: Checkpoint, folder: Path, *, root: Path) -> float:
    """Write the folder, and return how far its logits lie from the checkpoint's, relative to the largest.

    The model is put together as a resumed run does it, and proven as a published version is.

    Args:
        home: Whose registry is asked for bases.
        run: Whose checkpoint it is.
        point: The checkpoint.
        folder: A folder that does not exist yet; it appears whole or not at all.
        root: Where relative paths of the recipe begin.

    Raises:
        NotFound: If the run has lost what it chose to study.
        Conflict: If the folder exists.
        Damaged: If a file of the checkpoint was altered.
        ModelError: If the folder, loaded again, is not the model.
    """
    if read_selection(run.path) is None:
        raise NotFound(
            f"The run {run.id} has lost the list of its examples, without which its model cannot be put together. "
            "Export a version that it published: nightschool models export."
        )
    with publish_directory(folder) as partial:
        prepared = prepare(home, run, root=root, point=point)
        load_weights(point.path, prepared.task)
        prepared.task.release()
        prepared.task.model.eval()
        return prepared.write_version(partial)
