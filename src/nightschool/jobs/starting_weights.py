"""From which weights a run starts: the champion of its name, unless the recipe asks for others."""

from __future__ import annotations

from collections.abc import Mapping

from nightschool.config.recipe import Recipe
from nightschool.feedback.selection import DATA_PLANS
from nightschool.jobs.launch import OnLine
from nightschool.jobs.outcome import CycleRecord
from nightschool.store.atomic import read_json
from nightschool.store.home import Home
from nightschool.store.names import split_quantization
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore


def starting_weights(home: Home, recipe: Recipe, *, say: OnLine | None = None) -> str:
    """The champion of the recipe's name, unless the recipe asks for other weights than its line began with.

    An adapter has its rank, scale and places for good. Where the recipe asks for others, a new adapter begins on the
    base of the champion's.
    """
    champion = Registry(home).champion(recipe.name)
    # Some begin from scratch each time, unless the recipe's base says otherwise.
    anew = not DATA_PLANS[recipe.method].continues or recipe.from_checkpoint is not None or recipe.start == "base"
    if champion is None or anew or recipe.base.startswith(f"{recipe.name}@"):
        return recipe.base
    run = RunStore(home).which_made(champion)
    wanted = began_with = _first_weights(recipe.base, recipe.shape.given())
    if run is not None and CycleRecord.path(run).exists():
        record = CycleRecord.read(run)
        shape = recipe.shape.given() if record.recipe_shape is None else record.recipe_shape
        began_with = _first_weights(record.recipe_base, shape)
    if began_with != wanted:
        if say is not None:
            say(f"The recipe's base is {wanted}, and {champion.ref} grew from {began_with}: starting anew")
        return recipe.base
    differing = _other_adapter(run, recipe, champion)
    if differing:
        if say is not None:
            say(f"A new adapter begins on {champion.facts.base}, the base of {champion.ref}: {'; '.join(differing)}")
        quantization = split_quantization(recipe.base)[1]
        return split_quantization(champion.facts.base)[0] + (f"[{quantization}]" if quantization else "")
    return champion.ref


def _first_weights(base: str, shape: Mapping[str, object]) -> str:
    """What a line began with: its base, and where that is new its shape."""
    return f"{base} with {', '.join(f'{name}={value}' for name, value in sorted(shape.items()))}" if shape else base


def _other_adapter(run: Run | None, recipe: Recipe, champion: Version) -> list[str]:
    """What the recipe wants of an adapter that the champion, which `run` made, is not; nothing if it is no adapter."""
    if not DATA_PLANS[recipe.method].adapter or champion.facts.kind != "adapter":
        return []
    config = read_json(champion.path / "adapter_config.json")
    pairs: list[tuple[str, object, object]] = [
        ("r", recipe.lora.r, config.get("r")),
        ("alpha", recipe.lora.alpha, config.get("lora_alpha")),
    ]
    has_quantization = split_quantization(champion.facts.base)[1]
    wants = recipe.quantization.label if recipe.method == "qlora" else split_quantization(recipe.base)[1]
    # The adapter lists the modules that it found; what was asked for stands in the recipe that made it.
    before = None if run is None else Recipe.model_validate(run.recipe())
    if before is not None and DATA_PLANS[before.method].adapter:
        pairs.append(("target_modules", _places(recipe), _places(before)))
    differing = [f"lora.{key} is {wanted} and its adapter has {has}" for key, wanted, has in pairs if wanted != has]
    if wants != has_quantization:
        differing.append(
            f"its base is {has_quantization or 'not quantised'}, and {wants or 'plain weights'} is asked for"
        )
    return differing


def _places(recipe: Recipe) -> str:
    targets = recipe.lora.target_modules
    return targets if isinstance(targets, str) else ", ".join(sorted(set(targets)))
