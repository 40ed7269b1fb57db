"""Reading a recipe for a verb, and saying what was understood of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nightschool.cli.output import note
from nightschool.config.load import load_recipe
from nightschool.config.recipe import Recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with its overrides; other names that were translated are said on stderr.

    Raises:
        RecipeError: With all problems together.
        NotFound: If there is no such file.
    """
    loaded = load_recipe(path, overrides)
    for translated in loaded.notes:
        note(f"note: {translated}")
    return loaded.recipe
