"""What a teacher said of new facts, as tokens: where runs keep it, and its deletion with the conversation that taught one."""

from __future__ import annotations

from pathlib import Path

from nightschool.store.atomic import remove_folder
from nightschool.store.home import Home

FILE = "teacher.safetensors"
"""In the folder of a run."""


def cache_of(home: Home) -> Path:
    """Where another run with the same weights and lessons finds it."""
    return home.cache / "teachers"


def forget(home: Home, folder: Path) -> None:
    """Delete what the run in a folder keeps, and what is kept for other runs: the teacher is only asked anew."""
    (folder / FILE).unlink(missing_ok=True)
    if cache_of(home).is_dir():
        remove_folder(cache_of(home))
