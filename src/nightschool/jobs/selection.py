"""What there is to study: which examples are new, from which weights to start, and whether it is worth a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example
from nightschool.data.shards.shard_sources import shards_state
from nightschool.data.sources.load import split_held_out
from nightschool.errors import DataError, NotFound
from nightschool.feedback.novelty import novelty_for
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.training_data import load_sources
from nightschool.jobs.launch import OnLine
from nightschool.jobs.outcome import CycleContext
from nightschool.store.atomic import read_json
from nightschool.store.database import open_database
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore


@dataclass(frozen=True)
class Studied:
    """What the last finished cycle of a schedule had before it, so that the next can tell whether anything changed."""

    data_fingerprint: str
    outcome: str


@dataclass(frozen=True)
class NewExamples:
    """Examples to train that the starting weights have not learned, and how many there are in all.

    `shards` is the state of the token shards in place of examples, where those are studied.
    """

    examples: list[Example]
    num_all: int
    shards: str | None = None


def find_new_examples(home: Home, recipe: Recipe, root: Path) -> NewExamples:
    """What is new to the weights that a run of this recipe would start from."""
    if recipe.method == "pretrain":
        place = recipe.data[0].path
        if place is None:
            raise DataError("method: pretrain learns from token shards. Write data: [{path: shards/}].")
        return NewExamples([], 0, shards_state(place, root=root, max_files=recipe.pretrain.max_files))
    base = starting_weights(home, recipe)
    loaded = load_sources(recipe.data, home=home, root=root, name=recipe.name, base=base)
    trained = AcceptedExamples(open_database(home)).trained(recipe.name)
    train = split_held_out(loaded.examples, recipe.held_out, root=root, trained=trained).train
    return NewExamples(novelty_for(home, recipe.name, base, train).new, len(loaded.examples))


def champion_of(registry: Registry, name: str) -> Version | None:
    try:
        return registry.resolve(f"{name}@champion")
    except NotFound:
        return None


def starting_weights(home: Home, recipe: Recipe, *, say: OnLine | None = None) -> str:
    """The champion of the recipe's name, unless the recipe asks for other weights than its line began with.

    An adapter has its rank, scale and places for good. Where the recipe asks for others, a new adapter begins on the
    base of the champion's.
    """
    champion = champion_of(Registry(home), recipe.name)
    if recipe.method == "pretrain":  # from scratch, unless the recipe's base says otherwise
        return recipe.base
    if champion is None or recipe.base.startswith(f"{recipe.name}@"):
        return recipe.base
    began_with = _recipe_base(home, champion)
    if began_with is not None and began_with != recipe.base:
        if say is not None:
            say(f"The recipe's base is {recipe.base}, and {champion.ref} grew from {began_with}: starting anew")
        return recipe.base
    differing = _other_adapter(home, recipe, champion)
    if differing:
        if say is not None:
            say(f"A new adapter begins on {champion.facts.base}, the base of {champion.ref}: {'; '.join(differing)}")
        return champion.facts.base
    return champion.ref


def _other_adapter(home: Home, recipe: Recipe, champion: Version) -> list[str]:
    """What the recipe wants of an adapter that the champion's is not; nothing if the champion is none."""
    if recipe.method != "lora" or champion.facts.kind != "adapter":
        return []
    config = read_json(champion.path / "adapter_config.json")
    pairs: list[tuple[str, object, object]] = [
        ("r", recipe.lora.r, config.get("r")),
        ("alpha", recipe.lora.alpha, config.get("lora_alpha")),
    ]
    # The adapter lists the modules that it found; what was asked for stands in the recipe that made it.
    before = _recipe_of(home, champion)
    if before is not None and before.method == "lora":
        pairs.append(("target_modules", _places(recipe), _places(before)))
    return [f"lora.{key} is {wanted} and its adapter has {has}" for key, wanted, has in pairs if wanted != has]


def _places(recipe: Recipe) -> str:
    targets = recipe.lora.target_modules
    return targets if isinstance(targets, str) else ", ".join(sorted(set(targets)))


def _recipe_of(home: Home, version: Version) -> Recipe | None:
    """The recipe that made this version; None if its run is gone."""
    if version.facts.run_id is None:
        return None
    try:
        return Recipe.model_validate(RunStore(home).get(version.facts.run_id).recipe())
    except NotFound:
        return None


def _recipe_base(home: Home, version: Version) -> str | None:
    """The base that the recipe named when this version was made; None if its run is gone."""
    if version.facts.run_id is None:
        return None
    try:
        return CycleContext.read(RunStore(home).get(version.facts.run_id)).recipe_base
    except NotFound:
        return None


def fingerprint_of(recipe: Recipe, base: str, new: NewExamples) -> str:
    """A digest of all that the outcome depends on. When and how it is served changes nothing."""
    plain = recipe.as_plain()
    settings = {key: value for key, value in plain.items() if key not in ("schedule", "serve", "data", "base")}
    facts = {"base": base, "settings": settings, "examples": sorted(example.digest for example in new.examples)}
    if new.shards is not None:
        facts["shards"] = new.shards
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def reason_to_skip(recipe: Recipe, new: NewExamples, fingerprint: str, studied: Studied | None) -> str | None:
    wanted = recipe.schedule.min_new_examples
    if new.shards is not None:
        if studied is not None and studied.data_fingerprint == fingerprint:
            return (
                f"nothing changed since the last cycle, which was {studied.outcome}: the same shards, the same recipe"
            )
        return None
    if not new.examples:
        return f"no new data: {new.num_all} examples, all studied before"
    if len(new.examples) < wanted:
        return (
            f"too little new data: {len(new.examples)} new of {new.num_all} examples, "
            f"and schedule.min_new_examples is {wanted}"
        )
    if studied is not None and studied.data_fingerprint == fingerprint:
        return (
            f"nothing changed since the last cycle, which was {studied.outcome}: the same {len(new.examples)} new "
            "examples, the same starting weights, the same recipe"
        )
    return None
