"""Forms that the champion wrote for a run, and how many of its questions were none: in the folder of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nightschool.data.study.forms import Form
from nightschool.errors import Damaged
from nightschool.store.atomic import read_json, remove_folder, write_json
from nightschool.store.home import Home

FILE = "written_forms.json"
_CACHE = "written_forms"


@dataclass(frozen=True)
class WrittenForms:
    """Of `num_examples`, `num_asked` were asked for before time was over; `dropped` counts the others of `num_written` questions by why."""

    forms: list[Form] = field(default_factory=list)
    num_examples: int = 0
    num_asked: int = 0
    num_written: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, Any]:
        """Without a word of them."""
        return {
            "examples": self.num_examples,
            "asked": self.num_asked,
            "written": self.num_written,
            "kept": len(self.forms),
            "dropped": dict(self.dropped),
            "seconds": self.seconds,
        }

    @property
    def text(self) -> str:
        """How much of it was worth something, in a sentence or two."""
        studied = len({form.of for form in self.forms})
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items(), key=lambda one: -one[1]))
        text = (
            f"Of {self.num_written} questions that the champion wrote in {self.seconds:g} s, {len(self.forms)} are kept as forms of "
            f"{studied} of {self.num_examples} examples"
        )
        late = self.num_examples - self.num_asked
        return (
            text
            + (f" ({why})" if why else "")
            + ". Rules make the others."
            + (f" For {late} examples no time was left (study.write_for)." if late else "")
        )


def write_written(folder: Path, written: WrittenForms) -> None:
    """Write them, whole or not at all."""
    rows = [form.to_json() for form in written.forms]
    write_json(folder / FILE, {**written.counts, "forms": rows, "fingerprint": _fingerprint(rows)})


def read_written(folder: Path) -> WrittenForms | None:
    """What was written; None if nothing was.

    Raises:
        Damaged: If it is not what was written.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    row = read_json(path)
    if row.get("fingerprint") != _fingerprint(row.get("forms", [])):
        raise Damaged(f"{path} holds other forms than the champion wrote. Begin a new run.")
    forms = [Form.from_json(one) for one in row["forms"]]
    return WrittenForms(forms, row["examples"], row["asked"], row["written"], row["dropped"], row["seconds"])


def forms_written(folder: Path) -> list[Form]:
    """The forms alone, also of a run of which some were deleted."""
    path = folder / FILE
    return [Form.from_json(one) for one in read_json(path)["forms"]] if path.is_file() else []


def keep_forms_of(folder: Path, digests: Collection[str]) -> None:
    """Delete the forms of all other examples; the run then cannot go on, as one whose data were cut."""
    path = folder / FILE
    if path.is_file():
        row = read_json(path)
        left = [one for one in row["forms"] if one["of"] in digests]
        if len(left) < len(row["forms"]):
            write_json(path, row | {"forms": left})


def cached(home: Home, digest: str) -> Path:
    """Where another run with the same weights and examples finds them."""
    return home.cache / _CACHE / digest


def forget_cached(home: Home) -> None:
    """Delete what is kept for other runs: who deletes a conversation wants no copy left, and it is only written anew."""
    folder = home.cache / _CACHE
    if folder.is_dir():
        remove_folder(folder)


def _fingerprint(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:32]
