"""Data files → examples: checked, without duplicates, and split from what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from nightschool.config.recipe import HeldOut
from nightschool.data.example import CONVERSATIONS, Example
from nightschool.data.sources.formats import detect, to_examples
from nightschool.data.sources.labels import Labels
from nightschool.data.sources.parquet_rows import READ_COLUMNS
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.row_templates import RowTemplate
from nightschool.data.sources.rows import expand, read_rows
from nightschool.errors import DataError

MOST_EXAMPLES = 5_000_000
"""Of one file: an example takes a kilobyte of memory and more."""


@dataclass(frozen=True)
class SourceReport:
    """What one file, or the kept conversations, gave.

    `formats` counts rows by the format they were read as, `redacted` what was replaced by the kind of personal data.
    """

    source: str
    formats: dict[str, int]
    examples: int
    redacted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """All examples of a recipe, in the order of its sources.

    `duplicates` counts examples that were there before and were left out. `bad` and `superseded` count kept
    conversations that were left out, see `nightschool.feedback.conversation_examples.examples_of`.
    Some sources say themselves what of them is never trained (`held_out`); `parted` are the digests of the rest of these, `never`
    those of what is held out, however it may be asked. `leaked` counts examples that were left out because another source holds them out.
    """

    examples: list[Example]
    sources: list[SourceReport] = field(default_factory=list)
    duplicates: int = 0
    bad: int = 0
    superseded: int = 0
    held_out: list[Example] = field(default_factory=list)
    parted: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    leaked: int = 0


class Split(NamedTuple):
    """What is trained, and what never is."""

    train: list[Example]
    held_out: list[Example]


def read_file(path: Path, *, format: str = "auto", root: Path | None = None) -> Loaded:  # noqa: A002 - the recipe's word
    """Read one data file.

    Raises:
        NotFound: If it is not there.
        DataError: If rows are wrong: the first twenty problems, together.
    """
    problems = Problems()
    read = read_into(path, format, root or Path.cwd(), problems)
    problems.check()
    unique, duplicates = without_duplicates(read.examples)
    return replace(read, examples=unique, duplicates=duplicates)


def without_duplicates(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """The first of each content, with the paraphrases and alternatives of all of them, and how many others there were.

    Where one of them is a kept conversation, that one stays: what a person said is always studied.
    """
    unique: dict[str, Example] = {}
    duplicates = 0
    for example in examples:
        first = unique.get(example.digest)
        if first is None:
            unique[example.digest] = example
            continue
        duplicates += 1
        kept = example if example.source == CONVERSATIONS != first.source else first
        unique[example.digest] = replace(
            kept,
            paraphrases=tuple(dict.fromkeys(first.paraphrases + example.paraphrases)),
            key=first.key or example.key,
            alternatives=tuple(dict.fromkeys(first.alternatives + example.alternatives)),
        )
    return list(unique.values()), duplicates


def split_held_out(
    examples: Sequence[Example],
    held_out: HeldOut,
    *,
    root: Path | None = None,
    trained: Collection[str] = (),
    read: Callable[[list[Example]], list[Example]] = list,
) -> Split:
    """Part what is trained from what never is.

    By share, an example's digest decides, so that it is on the same side every night, whatever else is there. Kept
    conversations are never held out by share: who corrected an answer wants it learned.
    With a file of its own, what is in that file is left out of the training.

    Args:
        examples: All that there are.
        held_out: `recipe.held_out`.
        root: Where a relative path begins; by default the working directory.
        trained: Digests of what accepted versions have trained, when there were fewer than `min_examples`. It is never
            held out by share: the champion knows it by heart, so that no candidate could compare.
        read: What the method learns of the examples of `held_out.path`.

    Raises:
        NotFound, DataError: If `held_out.path` cannot be read.
    """
    if held_out.path is not None:
        kept = read(load_files(held_out.path, root or Path.cwd(), "held_out.path"))
        never = {example.digest for example in kept}
        return Split([example for example in examples if example.digest not in never], kept)
    if len(examples) < held_out.min_examples:
        return Split(list(examples), [])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        studied = example.source == CONVERSATIONS or example.digest in trained
        sides[not studied and is_held_out(example, held_out.share)].append(example)
    return Split(*sides)


def load_files(pattern: str, root: Path, key: str) -> list[Example]:
    """The examples of the files that the recipe's `key` names, without duplicates.

    Raises:
        NotFound: If it names nothing.
        DataError: If rows are wrong.
    """
    problems = Problems()
    parts = [read_into(path, "auto", root, problems) for path in expand(pattern, root, key)]
    problems.check()
    return without_duplicates(example for part in parts for example in part.examples)[0]


def is_held_out(example: Example, share: float) -> bool:
    """Whether the digest, read as a number between 0 and 1, lies below the share."""
    return int(example.digest[:13], 16) < share * 16**13


def read_into(
    path: Path, format_name: str, root: Path, problems: Problems, *, template: RowTemplate | None = None
) -> Loaded:
    """Read one file, by a template if there is one; what is wrong with its rows goes to `problems`, and duplicates stay in."""
    source = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    examples: list[Example] = []
    formats: Counter[str] = Counter()
    seen: dict[str, Example] = {}
    labels = Labels(path)
    columns = READ_COLUMNS if template is None else template.fields | {"id"}
    for row in read_rows(path, source=source, problems=problems, most_rows=MOST_EXAMPLES, columns=columns):
        try:
            if template is None:
                found = to_examples(labels.named(row), format_name)
            else:
                found = [template.example(row, str(row.fields.get("id", "")))]
        except DataError as error:
            problems.add(str(error))
            continue
        detected = (detect(row.fields) or "") if format_name == "auto" else format_name
        formats[detected if template is None else "template"] += 1
        for example in found:
            first = seen.setdefault(example.id, example) if example.id else example
            if first.digest != example.digest:
                problems.add(
                    f"{row.where}: the id {example.id!r} is already that of line {first.line}, with another content. "
                    "Give each row an id of its own."
                )
            else:
                examples.append(example)
    return Loaded(examples, [SourceReport(source, dict(formats), len(examples))])
