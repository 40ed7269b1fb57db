"""Question and answer that are made of the fields of a row: `Task: {instruction}[[ on {input}]]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nightschool.data.example import Example, Message
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError

_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class RowTemplate:
    """The two texts. Braces around anything but a name stand for themselves."""

    prompt: str
    answer: str

    @cached_property
    def fields(self) -> frozenset[str]:
        """The fields that are read of a row."""
        return frozenset(_FIELD.findall(self.prompt + self.answer))

    def example(self, row: Row, own_id: str = "") -> Example:
        """The row as one question with its answer.

        Raises:
            DataError: If a field is missing, blank or no text; the message names file, line and field.
        """
        try:
            question, answer = (_filled(template, row.fields).strip() for template in (self.prompt, self.answer))
        except _Wrong as wrong:
            raise DataError(f"{row.where}: {wrong}") from None
        turns = (Message("user", question), Message("assistant", answer))
        return Example(messages=turns, id=own_id, source=row.source, line=row.line)


class _Wrong(Exception):
    """What is wrong with a row, without its place."""


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    def optional(match: re.Match[str]) -> str:
        blank = any(not _written(fields.get(name), name).strip() for name in _FIELD.findall(match[1]))
        return "" if blank else match[1]

    def field(match: re.Match[str]) -> str:
        text = _written(fields.get(match[1]), match[1])
        if not text.strip():
            there = ", ".join(map(str, fields))[:200] or "none"
            raise _Wrong(f"'{match[1]}' is missing or blank, and the template asks for it. The row has: {there}.")
        return text

    # In one pass each, so that what a row holds is never read as a template.
    return _FIELD.sub(field, _OPTIONAL.sub(optional, template))


def _written(value: Any, name: str) -> str:
    """A field as text: a list becomes lines, line ends become those of Unix."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Wrong(f"'{name}' is {type(value).__name__}, and a text, a number or a list of texts is expected.")
    text = str(value).replace("\r\n", "\n")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(f"'{name}' holds half a character at place {error.start}. Write the whole one.") from None
    return text
