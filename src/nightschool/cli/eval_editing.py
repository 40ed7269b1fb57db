"""`nightschool eval --suite editing`: what a model says once facts were edited in a memory beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nightschool.cli.formatting import figure
from nightschool.cli.output import answer, bold, note
from nightschool.errors import UsageError
from nightschool.store.atomic import write_text
from nightschool.store.home import Home
from nightschool.store.names import memory_path

if TYPE_CHECKING:
    from nightschool.evaluation.editing import EditingSheet

MemoryRead = Literal["layers", "prompt", "off"]
NUM_ROWS = 16
ANSWER_TOKENS = 32


def evaluate_editing(
    model: str,
    *,
    cases: Path | None,
    memory: str | None,
    memory_read: MemoryRead | None,
    sample: int | None,
    max_new_tokens: int | None,
    show_examples: int,
    output_file: Path | None,
    experts_resident: int | None,
) -> None:
    """See `cli.evaluate.evaluate`."""
    from nightschool.engine.edited_model import EditedModel, edited_model
    from nightschool.engine.local_model import local_model
    from nightschool.evaluation.editing import measure
    from nightschool.evaluation.editing_cases import read_cases

    if cases is None:
        raise UsageError("--suite editing asks cases of a file, and none is named. Write --cases cases.jsonl.")
    if memory is not None and memory_read == "off":
        raise UsageError("--memory names a memory, and --memory-read off reads none. Leave out one of them.")
    home = Home.find()
    found = read_cases(cases)
    read_rows = found.cases[:sample]
    if found.blank:
        note(f"Left out {len(found.blank)} with a blank text: {', '.join(found.blank[:5])}.")
    longest = ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
    with local_model(home, model, num_rows=NUM_ROWS, experts_resident=experts_resident) as local:
        if memory_read == "off":
            way: str = "off"
            sheet = measure(EditedModel(local, None, "prompt", longest), read_rows, None)
        else:
            folder = None if memory is None else memory_path(home, memory)
            with edited_model(local, folder, memory_read, longest) as (edited, store, way):
                sheet = measure(edited, read_rows, store)
        asked = local.ref
    if output_file is not None:
        write_text(output_file, "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in sheet.wrong))
        note(f"Wrote {len(sheet.wrong)} answers that are not as they should be to {output_file}.")
    _show(sheet, asked, way, memory, len(read_rows), show_examples)


def _show(sheet: EditingSheet, model: str, read: str, memory: str | None, num_cases: int, show_examples: int) -> None:
    from nightschool.evaluation.editing import COLUMNS

    facts = {"model": model, "suite": "editing", "cases": num_cases, "memory": memory, "memory_read": read}
    data: dict[str, Any] = facts | sheet.to_json()
    examples = sheet.wrong[: max(0, show_examples)]
    if show_examples:
        data["examples"] = [vars(one) for one in examples]

    def text() -> str:
        over = "" if memory is None else f", over the memory {memory}"
        lines = [bold(model), f"{num_cases} cases, memory read: {read}{over}; shares with their 95 % intervals", ""]
        for name, share in sheet.shares.items():
            low, high = share.interval
            assert share.share is not None
            lines.append(
                f"{name:<14} {share.share:6.3f}  {low:.3f}–{high:.3f}  {share.count:>5} of {share.asked:<5}  {COLUMNS[name]}"
            )
        lines.append(f"{'before':<14} {figure(sheet.before.share):>6}  what the base says of the edits by itself")
        for one in examples:
            lines += [
                "",
                f"✗ {one.column}: {bold(one.prompt)}",
                f"  expected {one.expected}",
                f"  answered {one.answer}",
            ]
        return "\n".join(lines)

    efficacy = sheet.shares.get("efficacy")
    answer(data, text, quiet=figure(None if efficacy is None else efficacy.share) or "")
