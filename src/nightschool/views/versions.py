"""Published versions as people look at them: one line each, the story of one, and what the gate asked of two."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from nightschool.errors import Damaged, NotFound
from nightschool.evaluation.scores import ScoreSheet
from nightschool.feedback.erasure import taints_of
from nightschool.memory.staleness import StaleFact
from nightschool.store.atomic import read_json
from nightschool.store.registry import Registry, Version, VersionMetadata
from nightschool.store.versions import MEMORY_CONFIG

Stale = Mapping[str, Sequence[StaleFact]]


def version_summary(registry: Registry, version: Version, stale: Stale) -> dict[str, Any]:
    """One line of a list of versions. `gate` is the decision of its report, None where there is none,
    `tainted` the deleted conversations, and purged entries of memories (`facts/m12`), that the version may know, `stale` what it learned and a memory no longer says.

    `damaged` says what is wrong where nightschool.json or the report cannot be read; other versions are listed as usual.
    """
    pinned = registry.pinned(version.name)
    aliases = sorted(alias for alias, id_ in registry.aliases(version.name).items() if id_ == version.id)
    gate, facts, damaged = None, VersionMetadata(), []
    try:
        with contextlib.suppress(NotFound):  # the gate has not examined it
            gate = registry.load_report(version.name, version.id).get("decision")
    except Damaged as error:
        damaged.append(str(error))
    try:
        facts = version.facts
    except Damaged as error:
        damaged.append(str(error))
    return {
        "ref": version.ref,
        "name": version.name,
        "version": version.id,
        "aliases": aliases + (["pinned"] if pinned is not None and pinned.id == version.id else []),
        "gate": gate,
        "tainted": taints_of(registry.home.database, version.name).get(version.id, []),
        "stale": [one.to_json() for one in stale.get(version.ref, ())],
        "heldout_loss": facts.heldout_loss,
        "num_parameters": facts.num_parameters,
        "kind": "damaged" if damaged else facts.kind,
        "method": None if damaged else facts.method,
        "created_at": facts.created_at.isoformat() if facts.created_at else None,
        "damaged": " ".join(damaged) or None,
    }


def version_story(registry: Registry, version: Version, stale: Stale) -> dict[str, Any]:
    """All of one version: where it comes from, its files with their sizes in bytes, every move of its name's aliases.

    One that reads an explicit memory says which, and its revision when it was trained.

    Raises:
        Damaged: If a file is missing or has another size than its manifest says.
    """
    manifest = version.verify(digests=False)
    return {
        **version_summary(registry, version, stale),
        **version.facts.model_dump(mode="json", exclude={"probes"}),
        **_memory_of(version),
        "num_probes": len(version.facts.probes),
        "path": str(version.path),
        "size_bytes": manifest.size_bytes,
        "files": {file: facts.size_bytes for file, facts in manifest.files.items()},
        "history": [move.model_dump() | {"at": move.at.isoformat()} for move in registry.history(version.name)],
    }


def _memory_of(version: Version) -> dict[str, Any]:
    if version.facts.kind != "memory":
        return {}
    config = read_json(version.path / MEMORY_CONFIG)
    return {"memory": config.get("memory"), "memory_revision": config.get("revision")}


def score_sheets(registry: Registry, before: Version, after: Version) -> tuple[ScoreSheet, ScoreSheet]:
    """What both versions answered when the gate asked them, from an exam of both where there was one.

    Answers that were judged by other rules than those of today are judged anew, so that only answers can differ.

    Raises:
        NotFound: If one of them was never examined.
    """
    found: dict[str, ScoreSheet] = {}
    for version in registry.versions(after.name) + registry.versions(before.name):
        try:
            stored = registry.load_report(version.name, version.id).get("sheets", {})
        except (NotFound, Damaged):
            continue
        sheets = {
            row["version"]: ScoreSheet.from_json(row).by_rules_of_today() for row in stored.values() if row is not None
        }
        if before.ref in sheets and after.ref in sheets:
            return sheets[before.ref], sheets[after.ref]
        found = sheets | found
    missing = [version.ref for version in (before, after) if version.ref not in found]
    if missing:
        raise NotFound(
            f"The gate has not asked {' and '.join(missing)} anything, so there are no answers to compare. "
            "Compare versions that nightschool train has examined."
        )
    return found[before.ref], found[after.ref]
