"""Labelled questions whose facts are named by rows of a bank: `{"query", "target_indices", "target_scores"}`.

What the rows are says a mapping beside the file, `NAME_mapping.json`, or the one of the bank under that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from nightschool.data.example import Example
from nightschool.data.sources.bank_mapping import PARTS, mapping_of, read_mapping
from nightschool.data.sources.formats import needed_fact
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError, NotFound


class Labels:
    """The labels of one file. The mapping is read with the first row that needs it."""

    def __init__(self, path: Path) -> None:
        self._mapping = mapping_of(path)
        self._records: dict[int, dict[str, Any]] | None = None

    def named(self, row: Row) -> Row:
        """The row with its facts in words, as `targets`; as it is, where it names none by number.

        Raises:
            NotFound: If there is no mapping.
            DataError: If the row is malformed, or names a row that the mapping does not have; and as `read_mapping`.
        """
        if "target_indices" not in row.fields or "targets" in row.fields:
            return row
        indices, scores = row.fields["target_indices"], row.fields.get("target_scores")
        if not _are(indices, int) or not _are(scores, int | float) or len(indices) != len(scores):
            raise DataError(
                f"{row.where}: 'target_indices' and 'target_scores' are two lists of numbers of the same length, at least 1. "
                "Label the questions again: nightschool memory label."
            )
        records = self._read()
        missing = next((index for index in indices if index not in records), None)
        if missing is not None:
            raise DataError(
                f"{row.where}: the target {missing} is no row of {self._mapping.name}, which has {len(records)}. Labels and mapping "
                "are of one bank: label the questions again, nightschool memory label."
            )
        targets = [_fact(records[index]) | {"score": score} for index, score in zip(indices, scores, strict=True)]
        others = {name: value for name, value in row.fields.items() if not name.startswith("target_")}
        return replace(row, fields=others | {"targets": targets})

    def _read(self) -> dict[int, dict[str, Any]]:
        if self._records is None:
            if not self._mapping.is_file():
                raise NotFound(
                    f"{self._mapping} is not there, which says what the rows are that labels name. Copy knowledge_cache_mapping.json "
                    "of the same bank to it, or label the questions again: nightschool memory label."
                )
            self._records = read_mapping(self._mapping)
        return self._records


def with_needed_fact(example: Example, records: Iterable[Mapping[str, Any]]) -> Example:
    """The example with the fact that its answer needs: the first of these records whose value the answer, or the text, says.

    One that has a fact keeps it; where no value is said, it stays as it is.
    """
    if example.fact is not None:
        return example
    said = example.text if example.text is not None else example.answer or ""
    for record in records:
        parts = _fact(record)
        value = parts.get("value", "")
        if value and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said):
            return replace(example, fact=needed_fact(parts))
    return example


def _fact(record: Mapping[str, Any]) -> dict[str, Any]:
    subject, relation, value = (str(record.get(name) or "").strip() for name in PARTS)
    sentence: str = record["sentence"]
    if not (subject and relation and value):
        return {"text": sentence}
    fact = {"subject": subject, "relation": relation.replace("_", " "), "value": value}
    return fact | {"text": sentence} if subject in sentence and value in sentence else fact


def _are(values: Any, kind: Any) -> TypeGuard[list[Any]]:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    )
