"""`nightschool models`: published versions, and which of them is served."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nightschool.cli.formatting import figure, moment
from nightschool.cli.output import Columns, answer, answer_rows, bold, colour_wanted, confirm, note, rendered, who
from nightschool.cli.trade_off import trade_off
from nightschool.errors import Damaged, UsageError
from nightschool.evaluation.diff import AnswerDiff, answer_diff, shortened
from nightschool.evaluation.scores import figure_to_json
from nightschool.evaluation.verdict import GateReport
from nightschool.feedback.promotion import pin as pin_champion
from nightschool.feedback.promotion import promote as promote_version
from nightschool.feedback.promotion import roll_back
from nightschool.memory.staleness import StaleVersions
from nightschool.store.atomic import folder_bytes, publish_directory
from nightschool.store.home import Home
from nightschool.store.names import parse_ref
from nightschool.store.registry import Registry, Version
from nightschool.units import format_bytes
from nightschool.views.runs import tried
from nightschool.views.versions import score_sheets, version_story, version_summary

if TYPE_CHECKING:
    from nightschool.training.add_model import Added


def ls(name: str | None = None, /) -> None:
    """List versions, newest first, with the aliases that point to them.

    TAINTED counts deleted conversations and purged memory entries that a version may know, STALE the facts that it learned and a memory no longer says.

    Args:
        name: Only versions of this name.
    """
    registry = Registry(Home.find())
    names = registry.names() if name is None else [parse_ref(name).name]
    rows, stale = [], StaleVersions(registry.home)
    for one in names:
        try:
            learned = stale.of(parse_ref(one).tenant)
            rows += [version_summary(registry, version, learned) for version in registry.versions(one)]
        except Damaged as error:
            if name is not None:
                raise
            note(f"{one}: {error}")
    if name is not None and not rows:
        registry.resolve(name)
    for row in rows:
        if row["damaged"]:
            note(f"{row['ref']}: {row['damaged']}")
    columns: Columns = {
        "VERSION": "ref",
        "ALIASES": lambda row: ", ".join(row["aliases"]) or None,
        "GATE": "gate",
        "TAINTED": lambda row: len(row["tainted"]) or None,
        "STALE": lambda row: len(row["stale"]) or None,
        "HELD-OUT": lambda row: figure(row["heldout_loss"]),
        "PARAMETERS": lambda row: _count(row["num_parameters"]),
        "KIND": "kind",
        "METHOD": "method",
        "CREATED": lambda row: moment(row["created_at"]),
    }
    answer_rows(rows, columns, none="No versions yet. Make one with nightschool train RECIPE.", quiet="ref")


def show(model: str, /) -> None:
    """Show one version: where it comes from, its files, who moved its aliases.

    Args:
        model: NAME (its champion), NAME@ALIAS or NAME@VERSION.
    """
    registry = Registry(Home.find())
    version = registry.resolve(model)
    data = version_story(registry, version, StaleVersions(registry.home).of(parse_ref(version.name).tenant))

    def text() -> str:
        hidden = ("files", "history", "aliases", "size_bytes", "name", "version", "stale")
        lines = [f"{'version':<18} {version.ref}", f"{'aliases':<18} {', '.join(data['aliases']) or '-'}"]
        lines += [f"{k:<18} {figure(v, 6)}" for k, v in data.items() if k not in (*hidden, "ref") and v is not None]
        lines += [f"{'stale':<18} {one['memory']} no longer says: {one['text']}" for one in data["stale"]]
        lines.append(f"{'size':<18} {format_bytes(data['size_bytes'])} in {len(data['files'])} files")
        lines += [
            f"{'history':<18} {moment(move['at'])}  {move['action']} {move['alias']}: "
            f"{move['before'] or '-'} → {move['after'] or '-'} by {move['by']}"
            for move in data["history"]
        ]
        return "\n".join(lines)

    answer(data, text, quiet=version.ref)


def report(model: str, /) -> None:
    """Show what the gate found: each rule, both figures, the answers that were learned and lost, what spot checks found by step.

    Args:
        model: NAME@VERSION or NAME@ALIAS; NAME is its newest version.
    """
    from nightschool.evaluation.report import render
    from nightschool.views.places import lines_of_places, places_of

    registry = Registry(Home.find())
    version = registry.resolve(model if "@" in model else f"{model}@latest")
    stored = registry.load_report(version.name, version.id)

    def text() -> str:
        found = GateReport.from_json(stored)
        drawn = rendered(partial(render, found))
        places = tried(lambda: places_of(registry, version), None)
        if places is not None:
            drawn += "\n\n" + "\n".join(lines_of_places(places, version))
        if found.effort is None or not found.effort.checks:
            return drawn
        curve = trade_off([(one.step, one.learned, one.drift) for one in found.effort.checks], found.effort.step)
        return f"{drawn}\n\n{bold('Spot checks')}, which pass with {found.effort.passing}\n{curve}"

    answer(stored, text, quiet=lambda: str(stored["decision"]))


def diff(first: str, second: str, /) -> None:
    """Show the answers that differ between two versions, from what the gate asked of them.

    Args:
        first: NAME@VERSION or NAME@ALIAS.
        second: Another version.
    """
    registry = Registry(Home.find())
    before, after = registry.resolve(first), registry.resolve(second)
    sheets = score_sheets(registry, before, after)
    changed = answer_diff(*sheets)
    asked = len({one.id for one in sheets[0].answers} & {one.id for one in sheets[1].answers})

    def text() -> str:
        losses = [figure(sheet.heldout_loss) or "-" for sheet in sheets]
        lines = [
            f"{before.ref} → {after.ref}: {len(changed)} of {asked} answers differ, held-out loss {losses[0]} → {losses[1]}"
        ]
        for one in changed:
            lines += [
                "",
                f"{one.verdict:<9} {bold(shortened(one.question))}",
                f"{'expected':<9} {shortened(one.expected)}",
            ]
            lines.append(f"{'':<9} {_coloured(one)}")
        return "\n".join(lines)

    answer(
        {
            "before": before.ref,
            "after": after.ref,
            "asked": asked,
            "heldout_loss": [figure_to_json(sheet.heldout_loss) for sheet in sheets],
            "differing": [one.to_json() for one in changed],
        },
        text,
        quiet=lambda: "\n".join(one.id for one in changed),
    )


def add(name: str, source: str, /) -> None:
    """Add a model that was made elsewhere as the first version of a name; it is the champion at once.

    It is copied into the home, loaded again by plain transformers and compared, tensor by tensor and in its logits.
    Adding the same files again changes nothing.

    Args:
        name: A name that has no versions yet.
        source: A Hugging Face or PEFT folder, a GGUF file, or a hub id.
    """
    from nightschool.training.add_model import add_model

    added = add_model(Home.find(), name, source, by=who())
    answer(
        {"ref": added.version.ref, "champion": added.champion.ref, "added": added.is_new},
        told(added),
        quiet=added.version.ref,
    )


def told(added: Added) -> str:
    """What came of adding a model, in words."""
    version, facts = added.version, added.version.facts
    done = f"Added {version.ref}" if added.is_new else f"{version.ref} was added from these files before"
    return (
        f"{done} ({_count(facts.num_parameters)} parameters, {facts.dtype}). "
        f"The champion of {version.name} is {added.champion.ref}."
    )


def promote(model: str, /) -> None:
    """Make a version the champion. The gate is not asked.

    Args:
        model: NAME@VERSION or NAME@ALIAS.
    """
    home = Home.find()
    registry = Registry(home)
    wanted = parse_ref(model)
    if "@" not in model:
        raise UsageError(
            f"{model!r} names no version. Write {model}@VERSION; nightschool models ls {model} lists them."
        )
    before = registry.champion(wanted.name)
    _moved(before, promote_version(home, wanted.name, registry.resolve(model).id, by=who()))


def rollback(name: str = "default", /) -> None:
    """Make the previous champion the champion again. Servers swap to it; what was learned since is not replayed.

    Args:
        name: The name whose champion goes back.
    """
    home = Home.find()
    before = Registry(home).champion(name)
    _moved(before, roll_back(home, parse_ref(name).name, by=who()))


def pin(model: str, /) -> None:
    """Hold the champion: until `unpin`, nothing moves it.

    Args:
        model: NAME pins its champion; NAME@VERSION makes that version the champion and pins it.
    """
    home = Home.find()
    version = Registry(home).resolve(model)
    pin_champion(home, version.name, version.id, by=who())
    answer({"pinned": version.ref}, f"Pinned {version.ref}: no cycle moves the champion.", quiet=version.ref)


def unpin(name: str, /) -> None:
    """Let cycles move the champion again.

    Args:
        name: The name whose champion was pinned.
    """
    Registry(Home.find()).unpin(parse_ref(name).name, by=who())
    answer({"unpinned": name}, f"Unpinned {name}: the next candidate that passes becomes the champion.", quiet=name)


def alias(model: str, alias: str, /, *, rm: bool = False) -> None:
    """Point an alias of your own to a version, so that NAME@ALIAS means it. A version with an alias is never deleted.

    Args:
        model: NAME@VERSION or NAME@ALIAS; NAME is its champion. With --rm only the name counts.
        alias: A word of your own, such as stable. champion, previous and latest move by themselves.
        rm: Take the alias away.
    """
    registry = Registry(Home.find())
    name = parse_ref(model).name
    if rm:
        registry.remove_alias(name, alias, by=who())
        answer({"alias": alias, "name": name, "ref": None}, f"Removed the alias {alias} of {name}.", quiet=alias)
        return
    version = registry.set_alias(name, alias, registry.resolve(model).id, by=who())
    answer({"alias": alias, "name": name, "ref": version.ref}, f"{name}@{alias} is {version.ref}.", quiet=version.ref)


def export(model: str, folder: Path, /, *, merge: bool = False) -> None:
    """Copy a version to a folder of your own: a plain Hugging Face folder, which transformers and vLLM load.

    Args:
        model: NAME (its champion), NAME@ALIAS or NAME@VERSION.
        folder: A folder that does not exist yet.
        merge: Add an adapter into its base's weights, for whoever cannot load adapters; logits are compared.
    """
    version = Registry(Home.find()).resolve(model)
    version.verify(digests=True)
    difference = None
    with publish_directory(folder.absolute()) as partial:
        if merge:
            from nightschool.models.merged_export import write_merged

            difference = write_merged(version, Home.find(), partial)
        else:
            # `copyfile` and not `copy2`: the copy is the user's, so it is writable and of today.
            shutil.copytree(version.path, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
    size = folder_bytes(folder)
    compared = (
        "" if difference is None else f" Its logits differ by {difference:.1e} of the largest from the adapter's."
    )
    answer(
        {"ref": version.ref, "path": str(folder.resolve()), "size_bytes": size, "logit_difference": difference},
        f"Exported {version.ref} to {folder} ({format_bytes(size)}).{compared}",
        quiet=str(folder),
    )


def rm(model: str, /, *more: str, yes: bool = False) -> None:
    """Delete versions that nothing points at. Their ids are never used again, and their reports stay.

    Args:
        model: NAME@VERSION.
        more: More versions.
        yes: Do not ask.
    """
    registry = Registry(Home.find())
    for one in (model, *more):
        if parse_ref(one).version is None:
            raise UsageError(
                f"{one!r} names no version by its id. Write NAME@VERSION, such as default@20261121_023000."
            )
    versions = [registry.resolve(one) for one in (model, *more)]
    size = sum(folder_bytes(version.path) for version in versions)
    confirm(f"Delete {', '.join(version.ref for version in versions)} ({format_bytes(size)})?", yes=yes)
    for version in versions:
        registry.remove(version.name, version.id)
    answer(
        {"removed": [version.ref for version in versions], "freed_bytes": size},
        f"Deleted {', '.join(version.ref for version in versions)} ({format_bytes(size)}).",
        quiet="\n".join(version.ref for version in versions),
    )


def _coloured(one: AnswerDiff) -> str:
    if not colour_wanted():
        return shortened(one.as_text())
    codes = {"same": "", "removed": "\x1b[9;31m", "added": "\x1b[32m"}
    return "".join(f"{codes[change]}{shortened(part) or ' '}\x1b[0m" for change, part in one.words)


def _moved(before: Version | None, version: Version) -> None:
    was = f" (was {before.ref})" if before and before != version else ""
    answer(
        {"champion": version.ref, "before": before.ref if before else None},
        f"The champion of {version.name} is {version.ref}{was}.",
        quiet=version.ref,
    )


def _count(number: int | None) -> str | None:
    """`853k`, `4.02B`."""
    if number is None:
        return None
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
