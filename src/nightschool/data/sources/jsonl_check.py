"""Whether a JSONL file could be trained on, told before anything is spent: read as training will, keeping none of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nightschool.data.sources.formats import detect, to_examples
from nightschool.data.sources.json_rows import json_lines
from nightschool.data.sources.load import MOST_EXAMPLES
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError

# A line is decoded in one go, and nobody else computes meanwhile.
LONGEST_LINE_BYTES = 2_000_000


@dataclass(frozen=True)
class JsonlSummary:
    """The one format of all lines, and how many examples there are."""

    format: str
    num_examples: int


def check_jsonl(path: Path, source: str, formats: tuple[str, ...]) -> JsonlSummary:
    """Read every line of a file, all of one of `formats`.

    Raises:
        DataError: If lines are wrong: the first twenty problems, each with `source` and its line.
    """
    problems = Problems()
    first, number = "", 0
    try:
        for line, value in json_lines(path, source, problems, LONGEST_LINE_BYTES):
            try:
                found = _format_of(value, f"{source}:{line}", formats)
                first = first or found
                if found != first:
                    raise DataError(
                        f"{source}:{line}: this line is in the format {found}, and those before it are in {first}. "
                        "Upload them as two files."
                    )
                number += len(to_examples(Row(value, source, line), found))
            except DataError as error:
                problems.add(str(error))
            if number > MOST_EXAMPLES:
                raise DataError(f"{source}: there are more than {MOST_EXAMPLES:,} examples. Upload a part of them.")
    except DataError as error:
        if problems.raised:
            raise
        problems.add(str(error))
    problems.check()
    if not number:
        raise DataError(f"{source}: there are no examples. Write one JSON object on each line.")
    return JsonlSummary(first, number)


def _format_of(value: object, where: str, formats: tuple[str, ...]) -> str:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a line is a JSON object, and this one is not. Write {{"messages": […]}}.')
    found = detect(value)
    if found not in formats:
        raise DataError(
            f"{where}: the fields {', '.join(str(name)[:40] for name in list(value)[:8]) or '(none)'} are none of those "
            'that can be trained on. Write {"messages": […]}.'
        )
    return found
