"""`nightschool config`: recipes, what they say and what they may say."""

from __future__ import annotations

from pathlib import Path

from nightschool.cli.output import answer, print_json
from nightschool.config.load import load_recipe
from nightschool.config.schema import json_schema
from nightschool.config.write import to_yaml


def show(recipe: Path, /, *overrides: str, origin: bool = False) -> None:
    """Print the resolved recipe as YAML that repeats it.

    Args:
        recipe: A recipe file.
        overrides: Settings, as train.epochs=3.
        origin: Say beside each setting who set it: default, recipe, environment or override.
    """
    loaded = load_recipe(recipe, overrides)
    plain = loaded.recipe.as_plain()
    data: object = plain
    if origin:
        origins = {key: {"kind": one.kind, "where": one.where} for key, one in loaded.origins.items()}
        data = {"recipe": plain, "origins": origins, "notes": list(loaded.notes)}
    answer(data, lambda: to_yaml(loaded.recipe, loaded.origins if origin else None).rstrip())


def schema() -> None:
    """Print the JSON schema of a recipe, for editors: `# yaml-language-server: $schema=…`."""
    print_json(json_schema())


def validate(recipe: Path, /, *overrides: str) -> None:
    """Check a recipe and say everything that is wrong with it. Exits 2 if something is.

    Args:
        recipe: A recipe file.
        overrides: Settings, as train.epochs=3.
    """
    loaded = load_recipe(recipe, overrides)
    answer(
        {"valid": True, "name": loaded.recipe.name, "notes": list(loaded.notes)},
        lambda: "\n".join([*(f"note: {note}" for note in loaded.notes), f"{recipe} is a valid recipe."]),
        quiet="",
    )
