"""`nightschool data`: what a recipe would study."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightschool.cli.output import answer, bold, confirm, note, who
from nightschool.cli.recipes import read_recipe
from nightschool.config.recipe import Recipe
from nightschool.data.example import Example
from nightschool.data.shards.shard_sources import is_shard_folder, open_shards
from nightschool.data.shards.shards import verify_shard
from nightschool.data.sources.load import Loaded, read_file
from nightschool.errors import Damaged, UsageError
from nightschool.feedback.contradictions import notes_on, what_to_do
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.retraining import retrain as train_anew
from nightschool.feedback.selection import select_loaded
from nightschool.feedback.training_data import load_sources
from nightschool.jobs.starting_weights import starting_weights
from nightschool.memory.adopted import in_memories
from nightschool.memory.forgetting import forget_conversation, traces_with_entries
from nightschool.store.home import Home

RECIPE_ENDINGS = (".yaml", ".yml")


def preview(source: Path, /, *overrides: str, count: int = 3) -> None:
    """Show the first examples as they are read: who says what, and where it came from.

    Args:
        source: A recipe, or a data file.
        overrides: Settings of the recipe, as data.0.path=train.json.
        count: How many examples.
    """
    loaded = _load(_recipe(source, overrides), source)
    shown = loaded.examples[: max(0, count)]

    def text() -> str:
        parts = ["\n".join([bold(f"{one.source}:{one.line}"), *_turns(one)]) for one in shown]
        return "\n\n".join([*parts, f"{len(shown)} of {len(loaded.examples)} examples"])

    answer({"examples": [one.to_json() for one in shown], "num_examples": len(loaded.examples)}, text)


def check(source: Path, /, *overrides: str) -> int:
    """Read everything and say what there is, or everything that is wrong, with file and line.

    Of a folder of token shards, every byte is compared with its index.

    Args:
        source: A recipe, a data file, or a folder of token shards.
        overrides: Settings of the recipe, as data.0.path=train.json.
    """
    if is_shard_folder(source):
        return _check_shards(source)
    recipe = _recipe(source, overrides)
    loaded = _load(recipe, source)
    data: dict[str, Any] = {
        "examples": len(loaded.examples),
        "sources": [asdict(report) for report in loaded.sources],
        "duplicates": loaded.duplicates,
        "bad": loaded.bad,
        "superseded": loaded.superseded,
        "held_out_elsewhere": loaded.leaked,
        "with_paraphrases": sum(1 for one in loaded.examples if one.paraphrases),
        "with_key": sum(1 for one in loaded.examples if one.key),
        "with_alternatives": sum(1 for one in loaded.examples if one.alternatives),
    }
    shown: list[str] = []
    if recipe is not None:
        home = Home.find()
        wanted = recipe.begun_with(starting_weights(home, recipe))
        selection = select_loaded(loaded, wanted, home, Path.cwd(), in_memories(home, recipe.name))
        data |= {
            "held_out": len(selection.held_out),
            "new": selection.num_new,
            "studied_before": selection.num_left_out + len(selection.new) - selection.num_new,
            "waiting": selection.num_waiting,
            "held_by_memories": selection.num_held,
            "contradicting": sum(one.num_untrained for one in selection.contradictions),
        }
        shown = [*notes_on(selection.contradictions), what_to_do(selection.contradictions, recipe.name)]
        data["contradictions"] = [one.to_json() for one in selection.contradictions]

    def text() -> str:
        lines = [
            f"{report.source}: {report.examples} examples ("
            + ", ".join(f"{rows} rows of {name}" for name, rows in report.formats.items())
            + ")"
            + "".join(f", {count} x {kind} replaced" for kind, count in report.redacted.items())
            for report in loaded.sources
        ]
        lines += [f"{key.replace('_', ' '):<18} {value}" for key, value in data.items() if isinstance(value, int)]
        lines += [line for line in shown if line]
        return "\n".join(lines)

    answer(data, text, quiet=str(len(loaded.examples)))
    return 0


def _check_shards(folder: Path) -> int:
    """Compare shards with their index; 1 if one is damaged."""
    index = open_shards(str(folder), root=Path.cwd(), cache=Home.find().cache / "shards", sizes=False).shards.index
    rows = []
    for facts in index.shards:
        row: dict[str, Any] = {"file": facts.file, "tokens": facts.tokens, "documents": facts.documents, "whole": True}
        try:
            verify_shard(folder / facts.file, facts)
        except Damaged as error:
            row |= {"whole": False, "detail": str(error)}
        rows.append(row)
    damaged = [row for row in rows if not row["whole"]]

    def text() -> str:
        lines = [f"DAMAGED  {row['detail']}" for row in damaged]
        return "\n".join(
            [*lines, f"{len(rows) - len(damaged)} of {len(rows)} shards are whole: {index.tokens:,} tokens in all"]
        )

    answer({"shards": rows, "tokens": index.tokens, "damaged": len(damaged)}, text, quiet=str(len(damaged)))
    return 1 if damaged else 0


def forget(request_id: str, /, *, retrain: bool = False, yes: bool = False) -> None:
    """Delete a kept conversation, its copies in the data of runs, jobs and files, what later nights would replay of it, and what memories have from it.

    Versions that studied it, and those that grew from them, keep what they learned and are marked as tainted: roll back,
    or train anew, which --retrain queues.

    Args:
        request_id: The id that the answer came with.
        retrain: Queue a job for each tainted name that trains it without the conversation, from clean weights.
        yes: Do not ask.
    """
    home = Home.find()
    kept = ConversationStore(home.database).get(request_id)
    traces = traces_with_entries(home, kept)
    copies = [*traces.runs, *traces.jobs, *traces.files]
    where = [f"in the data of {', '.join(copies)}"] if copies else []
    where += [f"in the memories' entries {', '.join(traces.memories)}"] if traces.memories else []
    where += [f"known to {', '.join(traces.versions)}"] if traces.versions else []
    note(f"{request_id} is {' and '.join(where) or 'in no data and no version'}.")
    confirm(f"Delete the conversation {request_id} of {kept.time:%Y-%m-%d %H:%M} and its corrections?", yes=yes)
    traces, replayed = forget_conversation(home, request_id, author=who())
    text = f"Deleted {request_id}, and {replayed} examples that would have been replayed."
    if traces.memories:
        text += f" Purged: {', '.join(traces.memories)}."
    if traces.versions:
        text += f" Tainted: {', '.join(traces.versions)}."
    data: dict[str, Any] = {"forgotten": request_id, "accepted_examples_deleted": replayed}
    data |= {kind: list(getattr(traces, kind)) for kind in ("runs", "jobs", "files", "memories")}
    data |= {"tainted": list(traces.versions)}
    if retrain:
        anew = train_anew(home, traces, source="cli")
        data |= anew.to_json()
        text += "".join(f"\n{name} is trained anew by {job}." for name, job in anew.jobs.items())
        text += "".join(f"\n{name} is not trained anew: {why}" for name, why in anew.without.items())
    answer(data, text, quiet=request_id)


def _recipe(source: Path, overrides: tuple[str, ...]) -> Recipe | None:
    """The recipe; None if the source is a data file."""
    if source.suffix in RECIPE_ENDINGS:
        return read_recipe(source, overrides)
    if overrides:
        raise UsageError(f"{source} is a data file, and {overrides[0]} a setting of a recipe. Name a recipe.")
    return None


def _load(recipe: Recipe | None, source: Path) -> Loaded:
    if recipe is None:
        return read_file(source, root=Path.cwd())
    home = Home.find()
    base = starting_weights(home, recipe)
    return load_sources(recipe.data, root=Path.cwd(), home=home, name=recipe.name, base=base)


def _turns(example: Example) -> list[str]:
    if example.text is not None:
        return [example.text]
    turns = [
        f"{turn.role}: {turn.content}" + ("" if turn.role != "assistant" or turn.weight else "  (context only)")
        for turn in example.messages
    ]
    return [
        *turns,
        *(f"also asked as: {wording}" for wording in example.paraphrases),
        *(f"must be said: {part}" for part in example.key),
        *(f"as right: {other}" for other in example.alternatives),
    ]
