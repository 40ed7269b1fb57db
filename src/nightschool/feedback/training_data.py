"""A recipe's data → examples: files, and the conversations that the server recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from nightschool.config.recipe import ANY_NAME, DataSource
from nightschool.data.redact import Redactor
from nightschool.data.sources.load import Loaded, SourceReport, read_into, without_duplicates
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import expand
from nightschool.errors import NotFound
from nightschool.feedback.conversation_examples import examples_of
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.lineage import start_of
from nightschool.store.home import Home
from nightschool.store.names import CHAMPION, full_name, is_stamp, moment_of, split_name
from nightschool.store.principal import DEFAULT_TENANT
from nightschool.store.registry import Registry

_STAMP_SLACK = timedelta(minutes=1)
"""Run ids made within one second move on into the future; what is studied twice is recognised by its digest."""


def load_sources(
    sources: Sequence[DataSource],
    *,
    root: Path,
    home: Home | None = None,
    name: str | None = None,
    base: str | None = None,
) -> Loaded:
    """Read every source of a recipe.

    Args:
        sources: `recipe.data`.
        root: Where relative paths begin.
        home: Where conversations were recorded; needed for `from: conversations`.
        name: The recipe's name: whose champion `since: last_promoted` asks for, and whose conversations are studied
            unless the source names others.
        base: What the run starts from, if that is not the champion: `since: last_promoted` then asks for what came
            after that version's run began, and for everything where it is none of `name`'s.

    Raises:
        NotFound: If a path names nothing; the message begins with its key, such as `data.0.path`.
        DataError: If rows are wrong: the first twenty problems, together.
    """
    problems = Problems()
    parts: list[Loaded] = []
    for index, source in enumerate(sources):
        if source.path is not None:
            paths = expand(source.path, root, f"data.{index}.path")
            read = [read_into(path, source.format, root, problems) for path in paths]
        else:
            read = [_read_conversations(source, home, name, base, problems)]
        parts += [_as_wanted(part, source) for part in read]
    problems.check()
    unique, duplicates = without_duplicates(example for part in parts for example in part.examples)
    return Loaded(
        unique,
        [report for part in parts for report in part.sources],
        duplicates,
        sum(part.bad for part in parts),
        sum(part.superseded for part in parts),
    )


def _as_wanted(loaded: Loaded, source: DataSource) -> Loaded:
    """What was read of one place, repeated and without personal data as its source asks."""
    if source.repeat != 1:
        loaded = replace(loaded, examples=[replace(one, repeat=source.repeat) for one in loaded.examples])
    if source.redact:
        redactor, found = Redactor(source.redact), Counter[str]()
        loaded = replace(loaded, examples=[redactor.redact(one, found) for one in loaded.examples])
        loaded = replace(loaded, sources=[replace(report, redacted=dict(found)) for report in loaded.sources])
    return loaded


def _read_conversations(
    source: DataSource, home: Home | None, name: str | None, base: str | None, problems: Problems
) -> Loaded:
    assert home is not None, "conversations are recorded in a home"
    since = None
    if source.since == "last_promoted":
        assert name is not None, "only a name has a champion"
        since = _base_began(home, name, base)
    recorded = ConversationStore(home.database).select(
        source.where.rating,
        source.where.corrected,
        _studied_name(source, name),
        since,
        tenant=split_name(name)[0] if name is not None else DEFAULT_TENANT,
    )
    found = examples_of(recorded, problems)
    report = SourceReport("conversations", {"conversations": len(recorded)}, len(found.examples))
    return Loaded(found.examples, [report], bad=found.bad, superseded=found.superseded)


def _studied_name(source: DataSource, name: str | None) -> str | None:
    """The served name whose conversations are meant, or None for those of all."""
    wanted = source.where.model
    if wanted is None or wanted == ANY_NAME:
        return name if wanted is None else None
    # A recipe studies what was said to its own tenant alone.
    return full_name(split_name(name)[0] if name is not None else DEFAULT_TENANT, wanted)


def _base_began(home: Home, name: str, base: str | None) -> datetime | None:
    """When the run that made the base, or without one the champion, began to read its data; None if there is none.

    Not when it was promoted: what people said while it was being trained would never be studied.
    """
    registry = Registry(home)
    try:
        version = registry.resolve(f"{name}@{CHAMPION}") if base is None else start_of(registry, name, base)
    except NotFound:
        return None
    if version is None:
        return None
    stamp = (version.facts.run_id or "")[-len("YYYYmmdd_HHMMSS") :]
    return moment_of(stamp) - _STAMP_SLACK if is_stamp(stamp) else version.facts.created_at
