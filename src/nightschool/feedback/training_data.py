"""A recipe's data → examples: files, and the conversations that the server recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

from nightschool.config.data_sets import PromptStyle, data_sets_named
from nightschool.config.recipe import ANY_NAME, DataSource
from nightschool.data.redact import Redactor
from nightschool.data.sources.data_sets import find_all, last_rows_begin, read_data_set
from nightschool.data.sources.hub_files import files_named, is_on_hub
from nightschool.data.sources.load import Loaded, SourceReport, read_into
from nightschool.data.sources.mixing import joined, mixed
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.row_templates import RowTemplate
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
    read = []
    for index, source in enumerate(sources):
        if source.path is not None:
            found = _read_paths(source, source.path, root, f"data.{index}.path", problems)
        elif source.dataset is not None:
            found = _read_data_sets(source, source.dataset, root, home, f"data.{index}.dataset", problems)
        else:
            found = _read_conversations(source, home, name, base, problems)
        read.append(_as_wanted(found, source))
    problems.check()
    return joined(mixed(read, [source.weight for source in sources]))


def _read_paths(source: DataSource, path: str, root: Path, key: str, problems: Problems) -> Loaded:
    """The files that a path names, parted where the source says so."""
    template = None if source.prompt is None or source.answer is None else RowTemplate(source.prompt, source.answer)
    paths = files_named(path, key) if is_on_hub(path) else expand(path, root, key)
    whole = joined([read_into(one, source.format, root, problems, template=template) for one in paths])
    if source.held_out is None:
        return replace(whole, examples=whole.examples[: source.max_samples])
    border = last_rows_begin(len(whole.examples), source.held_out)
    trained = whole.examples[:border][: source.max_samples]
    held_out = whole.examples[border:][: source.max_samples]
    return replace(whole, examples=trained, held_out=held_out, parted=frozenset(one.digest for one in trained))


def _read_data_sets(
    source: DataSource, names: Sequence[str], root: Path, home: Home | None, key: str, problems: Problems
) -> Loaded:
    """Data sets by name, each parted as the table says."""
    try:
        found = find_all(data_sets_named(names, trained=True), folders_of_data_sets(source.folder, root, home))
    except NotFound as error:
        raise NotFound(f"{key}: {error}") from None
    parts = []
    for name, files in found.items():
        rows = read_data_set(name, files, root=root, problems=problems, max_samples=source.max_samples)
        trained = rows.examples(rows.trained, source.prompt_style, problems)
        held_out = rows.examples(rows.held_out, source.prompt_style, problems)
        as_asked = [one for style in get_args(PromptStyle) for one in rows.examples(rows.held_out, style, Problems())]
        places = ", ".join(sorted({row.source for _, row in [*rows.trained, *rows.held_out]}))
        parts.append(
            Loaded(
                trained,
                [SourceReport(places, {name: len(rows.trained) + len(rows.held_out)}, len(trained))],
                held_out=held_out,
                parted=frozenset(one.digest for one in trained),
                never=frozenset(one.digest for one in as_asked),
            )
        )
    return joined(parts)


def folders_of_data_sets(folder: str | None, root: Path, home: Home | None) -> list[Path]:
    """Where data sets are looked for before the Hub: the folder that was named, or else the home's."""
    if folder is not None:
        return [root / Path(folder).expanduser()]
    return [] if home is None else [home.data_sets]


def _as_wanted(loaded: Loaded, source: DataSource) -> Loaded:
    """What was read of one place, repeated and without personal data as its source asks."""
    if source.repeat != 1:
        loaded = replace(loaded, examples=[replace(one, repeat=source.repeat) for one in loaded.examples])
    if source.redact:
        redactor, found = Redactor(source.redact), Counter[str]()
        examples = [redactor.redact(one, found) for one in loaded.examples]
        held_out = [redactor.redact(one, found) for one in loaded.held_out]
        parted = frozenset(one.digest for one in examples) if loaded.parted else loaded.parted
        loaded = replace(loaded, examples=examples, held_out=held_out, parted=parted)
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
