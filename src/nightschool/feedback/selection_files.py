"""What was selected for a run, in its folder: where training, its resume, the gate and later nights read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nightschool.data.example import Example
from nightschool.data.study.forms import Form
from nightschool.errors import Damaged
from nightschool.events import read_events
from nightschool.feedback.contradictions import Contradiction, from_rows, to_rows
from nightschool.feedback.selection import Selection
from nightschool.feedback.written_forms import keep_forms_of
from nightschool.store.atomic import read_json, write_bytes, write_json

NEW, REPLAYED, GENERAL, HELD_OUT = "new_examples.jsonl", "replayed.jsonl", "general.jsonl", "heldout.jsonl"
STUDY, CONTRADICTIONS = "study.jsonl", "contradictions.jsonl"
FACTS = "selection.json"


def write_selection(folder: Path, selection: Selection) -> None:
    """Write the selection into the folder of a run, each file atomically and the one that says it is whole last."""
    facts = {
        "fingerprint": selection.fingerprint,
        "num_all": selection.num_all,
        "num_new": selection.num_new,
        "num_left_out": selection.num_left_out,
        "num_duplicates": selection.num_duplicates,
        "num_waiting": selection.num_waiting,
        "num_held": selection.num_held,
        "formats": selection.formats,
        "shards": selection.shards,
    }
    write_json(folder / FACTS, facts)
    lists = {
        REPLAYED: selection.replayed,
        GENERAL: selection.general,
        HELD_OUT: selection.held_out,
        NEW: selection.new,
    }
    for name, examples in lists.items():
        write_bytes(folder / name, _lines(examples))
    if selection.contradictions:
        write_bytes(folder / CONTRADICTIONS, lines_of(to_rows(selection.contradictions)))
    if selection.forms:
        write_bytes(folder / STUDY, _lines(selection.forms))


def read_forms(folder: Path) -> list[Form]:
    """The forms that a run studies or keeps aside, from its folder."""
    return [Form.from_json(row) for row in read_events(folder / STUDY)]


def read_contradictions(folder: Path) -> list[Contradiction]:
    """What contradicted in the data of a run, from its folder."""
    return from_rows(read_events(folder / CONTRADICTIONS))


def drop_forms_of_nothing(folder: Path) -> None:
    """Delete the forms of examples that are not among a run's new ones any more."""
    forms = read_forms(folder)
    there = {Example.from_json(row).digest for row in read_events(folder / NEW)}
    keep_forms_of(folder, there)
    left = [form for form in forms if form.of in there]
    if len(left) < len(forms):
        write_bytes(folder / STUDY, _lines(left))


def read_selection(folder: Path) -> Selection | None:
    """Return what `write_selection` wrote, or None if it did not come to its end.

    Raises:
        Damaged: If the files hold other data than was selected.
    """
    if not (folder / NEW).is_file():
        return None
    new, replayed, held_out, general = (
        [Example.from_json(row) for row in read_events(folder / name)] for name in (NEW, REPLAYED, HELD_OUT, GENERAL)
    )
    if not (folder / FACTS).is_file():  # begun when the examples alone were written
        return Selection(new, replayed, held_out)
    facts = read_json(folder / FACTS)
    fingerprint = facts.pop("fingerprint")
    selection = Selection(
        new,
        replayed,
        held_out,
        general=general,
        forms=read_forms(folder),
        contradictions=read_contradictions(folder),
        **facts,
    )
    if selection.fingerprint != fingerprint:
        raise Damaged(
            f"The files {NEW}, {REPLAYED}, {GENERAL} and {STUDY} in {folder} hold other examples than were selected for this run. "
            "Begin a new run."
        )
    return selection


def _lines(examples: Iterable[Example | Form]) -> bytes:
    return lines_of(example.to_json() for example in examples)


def lines_of(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as lines of JSON."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
