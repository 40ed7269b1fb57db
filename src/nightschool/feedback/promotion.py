"""Moving the champion, and with it the pool of accepted examples that later nights replay.

An example is replayed as long as the champion, or one of the versions that it grew from, learned it. Promoting and
rolling back therefore switch the examples of versions on and off; none is ever deleted.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from nightschool.errors import Damaged
from nightschool.events import now, read_events
from nightschool.feedback.lineage import line_of
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store.home import Home
from nightschool.store.names import CHAMPION, split_name
from nightschool.store.outbox import EventType, announce
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import RunStore

NEW_EXAMPLES = "new_examples.jsonl"
REPLAYED = "replayed.jsonl"
# Deliveries are kept for longer than this, so what was told is known.
_NEWS = timedelta(days=1)


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


def settle(home: Home, name: str) -> None:
    """Let the pool of accepted examples follow the champion, where a crash kept it from that; twice is as once.

    Raises:
        NotFound: If the name has no champion.
    """
    registry = Registry(home)
    _follow(home, registry, registry.resolve(f"{name}@{CHAMPION}"))


def _follow(home: Home, registry: Registry, champion: Version) -> None:
    """Switch on what the champion's line learned, and off what only others learned."""
    accepted = AcceptedExamples(home.database)
    name = champion.name
    line = line_of(registry, champion)
    # What a version learned stays in the pool's table; asking the disk again for each of the line would take long.
    added = accepted.versions(name)
    for version in line.versions:
        if version.id in added:
            accepted.restore_version(name, version.id)
        else:
            began_anew = version is line.versions[-1] and not line.broken
            files = (REPLAYED, NEW_EXAMPLES) if began_anew else (NEW_EXAMPLES,)
            accepted.add(name, version.id, [row for file in files for row in _studied(home, version, file)])
    for version in registry.versions(name):
        if not line.may_hold(version.id):
            accepted.drop_version(name, version.id)
    _tell(home, registry, champion)


def _tell(home: Home, registry: Registry, champion: Version) -> None:
    """Tell the tenant of the last move of its champion, unless it was told, or it is long ago."""
    moves = [move for move in registry.history(champion.name) if move.alias == CHAMPION]
    last = moves[-1]
    event: EventType = "model.rolled_back" if last.action == "rollback" else "model.promoted"
    if now() - last.at < _NEWS:
        data = {"model": champion.name, "version": last.after, "previous_version": last.before, "by": last.by}
        with home.database.write() as connection:
            announce(connection, split_name(champion.name)[0], event, data, key=f"{champion.name} {len(moves)}")


def _studied(home: Home, version: Version, file: str) -> list[dict[str, Any]]:
    """Examples of the run which made this version; none if that run was deleted, or nobody knows which it was."""
    try:
        run = RunStore(home).which_made(version)
    except Damaged:
        return []
    return [] if run is None else list(read_events(run.path / file))
