"""Files of other programs → rows that a recipe studies. A converter is one entry in `CONVERTERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nightschool.data.sources.problems import Problems
from nightschool.data.sources.rows import Row, read_rows
from nightschool.errors import DataError, UsageError

_OMCQ_ASKS = "请选择正确答案。"
_OMCQ_FIELDS = ("question", "options", "correct_answer")

Converted = Iterator[dict[str, Any] | str]


def convert(kind: str, path: Path, *, max_samples: int | None = None, problems: Problems) -> Iterator[dict[str, Any]]:
    """The rows that a file becomes, one at a time.

    Args:
        kind: A name of `CONVERTERS`.
        path: The file.
        max_samples: Stop after so many rows; None takes all.
        problems: Gets what cannot be converted, with file and line.

    Raises:
        NotFound: If there is no such file.
        UsageError: If there is no such converter, or `max_samples` is below 1.
        DataError: If `problems` is full, or the file is none that can be read.
    """
    if kind not in CONVERTERS:
        raise UsageError(f"--from {kind}: no such converter. There are: {', '.join(CONVERTERS)}.")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max-samples is {max_samples}; it must be 1 or more.")
    return islice(_converted(CONVERTERS[kind], path, problems), max_samples)


def _converted(converter: Callable[[Row], Converted], path: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    for row in read_rows(path, problems=problems):
        for made in converter(row):
            if isinstance(made, str):
                problems.add(made)
            else:
                yield made


def _from_omcq(row: Row) -> Converted:
    """`{"target": [{"question", "options", "correct_answer"}]}`, or such a question by itself → a conversation each."""
    questions = row.fields.get("target", [row.fields])
    if not isinstance(questions, list):
        yield f"{row.where}: target holds {type(questions).__name__}, and a list of questions belongs there."
        return
    for number, question in enumerate(questions, start=1):
        where = f"{row.where} (target {number})" if len(questions) > 1 else row.where
        if not isinstance(question, dict):
            yield f"{where}: {type(question).__name__} is no question; {', '.join(_OMCQ_FIELDS)} belong there."
            continue
        values = [question.get(name) for name in _OMCQ_FIELDS]
        texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        if len(texts) < len(values):
            bad = [name for name, value in zip(_OMCQ_FIELDS, values, strict=True) if not _is_text(value)]
            yield f"{where}: {', '.join(bad)} must be there, be text and not be empty."
            continue
        asked, options, correct = texts
        turns = {"user": f"{asked}\n{options}\n{_OMCQ_ASKS}", "assistant": correct}
        yield {"conversations": [{"role": role, "content": content} for role, content in turns.items()]}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


CONVERTERS: dict[str, Callable[[Row], Converted]] = {"omcq": _from_omcq}
"""By the name that `nightschool data convert --from` takes: what makes rows, or a problem with its place, of one row."""


def refuse_nothing(count: int, path: Path) -> None:
    """Raise DataError if nothing was converted."""
    if not count:
        raise DataError(f"{path} holds nothing that could be converted.")
