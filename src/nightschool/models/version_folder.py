"""A loaded model as the folder of a version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nightschool.data.chat.render import stop_token_ids
from nightschool.models.export import prove_export, save_version_folder
from nightschool.models.load import LoadedModel

OnWritten = Callable[[Path], None]


def write_version(loaded: LoadedModel, folder: Path, on_written: OnWritten | None = None) -> float:
    """Write the model as a plain folder; return how far the folder's logits lie from its own, relative to the largest.

    `on_written` is called with the folder before it is loaded again.

    Raises:
        ModelError: If the folder, loaded again, is not the model.
    """
    base_path = loaded.base_location if loaded.adapter else None
    stop_ids = sorted(stop_token_ids(loaded.tokenizer))
    save_version_folder(loaded.model, loaded.tokenizer, folder, stop_ids=stop_ids, base_path=base_path)
    if on_written is not None:
        on_written(folder)
    return prove_export(loaded.model, folder, loaded.tokenizer)
