"""The prompts that a run rehearses, in its folder: chosen once, by whoever begins it, with the conversations that they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.errors import Damaged
from nightschool.store.atomic import read_json, remove_folder, write_json
from nightschool.store.home import Home

FILE = "rehearsed_prompts.json"
ANSWERS_FILE = "rehearsal.safetensors"
"""The answers to them, as tokens."""


@dataclass(frozen=True)
class RehearsedPrompt:
    """A prompt, whose it is as `rehearse.prompts` names it, and the request ids of those who asked it by day."""

    question: str
    source: str
    conversations: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChosenPrompts:
    """Prompts in the order in which they are asked, as far as there is room, and what is to be said of how they were chosen."""

    prompts: tuple[RehearsedPrompt, ...] = ()
    notes: tuple[str, ...] = ()


def write_chosen(folder: Path, chosen: ChosenPrompts) -> None:
    """Write them, whole or not at all."""
    rows = [
        {"question": one.question, "source": one.source, "conversations": list(one.conversations)}
        for one in chosen.prompts
    ]
    write_json(folder / FILE, {"prompts": rows, "notes": list(chosen.notes), "fingerprint": _fingerprint(rows)})


def read_chosen(folder: Path) -> ChosenPrompts | None:
    """What was chosen; None if nothing was.

    Raises:
        Damaged: If it is not what was chosen.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    plain = read_json(path)
    rows = plain["prompts"]
    if plain["fingerprint"] != _fingerprint(rows):
        raise Damaged(f"{path} holds other prompts than were chosen for this run. Begin a new run.")
    prompts = tuple(RehearsedPrompt(row["question"], row["source"], tuple(row["conversations"])) for row in rows)
    return ChosenPrompts(prompts, tuple(plain["notes"]))


def rehearses(folder: Path, request_id: str) -> bool:
    """Whether a run rehearses what was asked in a conversation."""
    path = folder / FILE
    return path.is_file() and any(request_id in row["conversations"] for row in read_json(path)["prompts"])


def forget_in(folder: Path, request_id: str) -> None:
    """Delete what was asked in a conversation, and all answers of the run, which then cannot go on, as one whose data were cut."""
    path = folder / FILE
    if rehearses(folder, request_id):
        (folder / ANSWERS_FILE).unlink(missing_ok=True)
        plain = read_json(path)
        write_json(
            path, plain | {"prompts": [one for one in plain["prompts"] if request_id not in one["conversations"]]}
        )


def cache_of(home: Home, prompts: Sequence[RehearsedPrompt]) -> Path:
    """Where another run with the same weights and prompts finds the answers; apart, where a person asked one of them."""
    return _of_conversations(home) if any(one.conversations for one in prompts) else home.cache / "rehearsals"


def forget_cached(home: Home) -> None:
    """Delete the answers to what persons asked that are kept for other runs: they are only asked for anew."""
    if _of_conversations(home).is_dir():
        remove_folder(_of_conversations(home))


def _of_conversations(home: Home) -> Path:
    return home.cache / "rehearsals" / "conversations"


def _fingerprint(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:32]
