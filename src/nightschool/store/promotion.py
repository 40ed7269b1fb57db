"""Moving the champion, and with it the pool of accepted examples that later nights replay.

An example is replayed as long as the champion, or one of the versions that it grew from, learned it. Promoting and
rolling back therefore switch the examples of versions on and off; none is ever deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nightschool.errors import NotFound
from nightschool.events import read_events
from nightschool.store.accepted import AcceptedExamples
from nightschool.store.database import open_database
from nightschool.store.home import Home
from nightschool.store.names import CHAMPION
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore

NEW_EXAMPLES = "new_examples.jsonl"


def promote(home: Home, name: str, version: str, *, by: str) -> Version:
    """Make `name@version` the champion and let the pool of accepted examples follow.

    Raises:
        NotFound: If there is no such version.
        Damaged: If it was altered since it was published.
        Conflict: If the champion is pinned to another version.
    """
    registry = Registry(home)
    champion = registry.promote(name, version, by=by)
    _follow(home, registry, champion)
    return champion


def roll_back(home: Home, name: str, *, by: str) -> Version:
    """Make the previous champion the champion again and let the pool of accepted examples follow.

    Raises:
        NotFound: If there is no version of this name.
        Conflict: If there is no previous champion, or the champion is pinned.
    """
    registry = Registry(home)
    champion = registry.rollback(name, by=by)
    _follow(home, registry, champion)
    return champion


def pin(home: Home, name: str, version: str, *, by: str) -> Version:
    """Make `name@version` the champion, hold it there, and let the pool of accepted examples follow.

    Raises:
        NotFound: If there is no such version.
        Conflict: If another version is pinned.
    """
    registry = Registry(home)
    champion = registry.pin(name, version, by=by)
    _follow(home, registry, champion)
    return champion


def _follow(home: Home, registry: Registry, champion: Version) -> None:
    """Switch on what the champion's line learned, and off what only others learned."""
    accepted = AcceptedExamples(open_database(home))
    name = champion.name
    versions = {version.id: version for version in registry.versions(name)}
    line = list(_line(champion, versions))
    champions_before = {move.after for move in registry.history(name)[:-1] if move.alias == CHAMPION}
    for version in line:
        # What a champion learned is in the pool since it became one; asking the disk again for each would take long.
        if version == champion or version.id not in champions_before:
            accepted.add(name, version.id, _new_examples(home, version))
        accepted.restore_version(name, version.id)
    oldest = line[-1]
    for version in versions.values():
        # Where the line breaks off at a version that was deleted, what is older may belong to it, and stays.
        if version not in line and (version.id > oldest.id or oldest.facts.parent is None):
            accepted.drop_version(name, version.id)


def _line(version: Version, versions: dict[str, Version]) -> Iterator[Version]:
    """The version and those that it grew from, newest first, as far as they still exist."""
    current: Version | None = version
    while current is not None:
        yield current
        name, _, parent = (current.facts.parent or "").partition("@")
        current = versions.get(parent) if name == version.name else None


def _new_examples(home: Home, version: Version) -> list[dict[str, Any]]:
    """The examples that were new to the run which made this version; none if that run was deleted."""
    if version.facts.run_id is None:
        return []
    try:
        run = RunStore(home).get(version.facts.run_id)
    except NotFound:
        return []
    return list(read_events(run.path / NEW_EXAMPLES))
