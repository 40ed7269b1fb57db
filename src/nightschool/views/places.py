"""Where the facts of a night are known: in the weights, in an explicit memory, or nowhere yet."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nightschool.errors import NotFound
from nightschool.evaluation.scores import ScoreSheet
from nightschool.evaluation.taught_facts import TaughtFacts, taught_facts
from nightschool.memory.adopted import in_memories
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore


def facts_of(registry: Registry, version: Version) -> tuple[Run, TaughtFacts]:
    """What a version knows of what its run taught, by the gate's answers.

    Raises:
        NotFound: If the run is gone, or the gate never asked the version.
        Damaged: If one of both was altered.
    """
    if version.facts.run_id is None:
        raise NotFound(f"{version.ref} came from no run, so nobody knows what it was taught.")
    run = RunStore(registry.home).get(version.facts.run_id)
    sheet = registry.load_report(version.name, version.id).get("sheets", {}).get("candidate")
    if sheet is None:
        raise NotFound(f"The report of {version.ref} has no answers. Let nightschool train examine it again.")
    return run, taught_facts(run, ScoreSheet.from_json(sheet))


def places_of(registry: Registry, version: Version) -> dict[str, Any] | None:
    """How many facts each place knows, and those that belong into a memory and are in none; None where nothing was asked."""
    _, facts = facts_of(registry, version)
    if not facts.known and not facts.unknown:
        return None
    held = in_memories(registry.home, version.name).held
    asked = [*facts.known, *facts.unknown]
    return {
        "asked": len(asked),
        "weights": len(facts.known),
        "memories": dict(Counter(held[one.digest] for one in asked if one.digest in held)),
        "unknown": sum(one.digest not in held for one in facts.unknown),
        "exact": [{"question": one.question, "answer": one.answer} for one in facts.exact if one.digest not in held],
    }


def lines_of_places(places: dict[str, Any], version: Version) -> list[str]:
    """The same for people, with the command that moves facts."""
    parts = [f"{places['weights']} of {places['asked']} known by the weights"]
    parts += [f"{count} in the memory {name}" for name, count in places["memories"].items()]
    lines = [f"{'facts':<16} {', '.join(parts)}, {places['unknown']} nowhere"]
    if places["exact"]:
        lines += [f"{'needs a memory':<16} {one['question']} {one['answer']}" for one in places["exact"]]
        lines.append(f"{'keep them there':<16} nightschool memory adopt {version.name} {version.ref}")
    return lines
