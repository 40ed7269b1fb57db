"""Rows of a Parquet file, within the bounds that lines of JSON have.

A few bytes of Parquet can stand for gigabytes: they are packed, and a text is stored once and named by many rows. So
what a file says of itself is looked at first, few rows are decoded at a time where a cell may be large, and what comes
out is measured before it becomes Python.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nightschool.data.sources.text_input import LINE_LIMIT_BYTES, open_data, too_long, too_many
from nightschool.errors import DataError
from nightschool.units import format_bytes

READ_COLUMNS = frozenset(
    [
        "query",
        "retrieved",
        "messages",
        "conversations",
        "conversation",
        "instruction",
        "input",
        "output",
        "instances",
        "system",
        "prompt",
        "completion",
        "response",
        "question",
        "answer",
        "chosen",
        "rejected",
        "preferred_output",
        "non_preferred_output",
        "text",
        "paraphrases",
        "alternatives",
        "id",
    ]
)
"""What some format reads; other columns are not decoded."""

ROW_GROUP_LIMIT_BYTES = 1_000_000_000
BATCH_BYTES = 256_000_000
BATCH_ROWS = 1024
# Text packs to a tenth, and a prompt that each row repeats to far less; a file that is made to burst to a millionth.
MOST_EXPANSION = 1000


def parquet_rows(
    path: Path, source: str, most_rows: int | None = None, columns: Collection[str] = READ_COLUMNS
) -> Iterator[tuple[int, Any]]:
    """Yield `(number of the row from 1, fields)`; empty cells are left out, and so are other columns.

    Raises:
        DataError: If it cannot be read, or has too many rows, too large row groups or too long rows.
    """
    try:
        with open_data(path) as opened, pq.ParquetFile(opened) as file:
            if most_rows is not None and file.metadata.num_rows > most_rows:
                raise too_many(source, f"{file.metadata.num_rows:,} rows", most_rows)
            _check_size(file, source)
            names = file.schema_arrow.names
            read = [name for name in names if name in columns]
            if not read and file.metadata.num_rows:  # the fields of one row are enough to say that no format fits
                yield 1, dict.fromkeys(names, "")
                return
            yield from _rows_of(file, read, source, MOST_EXPANSION * path.stat().st_size + BATCH_BYTES)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: the Parquet file cannot be read: {said}. Write it again.") from None


def _rows_of(file: pq.ParquetFile, columns: list[str], source: str, most_bytes: int) -> Iterator[tuple[int, Any]]:
    number = expanded_bytes = 0
    for batch in file.iter_batches(batch_size=_batch_rows(file), columns=columns):
        expanded_bytes += batch.nbytes
        if batch.nbytes > LINE_LIMIT_BYTES:
            for index in range(batch.num_rows):
                if batch.slice(index, 1).nbytes > LINE_LIMIT_BYTES:
                    raise too_long(source, number + index + 1, "the row")
        if expanded_bytes > most_bytes:
            raise DataError(
                f"{source}:{number + 1}: the file unpacks to more than {MOST_EXPANSION} times its size. "
                "Write its rows without repeating long texts, or as JSON Lines."
            )
        for fields in batch.to_pylist():
            number += 1
            yield number, {name: value for name, value in fields.items() if value is not None}


def _check_size(file: pq.ParquetFile, source: str) -> None:
    """Refuse by what the file says of itself, before anything is decoded."""
    largest = _largest_chunk_bytes(file)
    if largest > ROW_GROUP_LIMIT_BYTES:
        raise DataError(
            f"{source}: a column of one row group takes {format_bytes(largest)}, and the limit is "
            f"{format_bytes(ROW_GROUP_LIMIT_BYTES)}. Write it again with smaller row groups."
        )


def _largest_chunk_bytes(file: pq.ParquetFile) -> int:
    groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
    sizes = (group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns))
    return max(sizes, default=0)


def _batch_rows(file: pq.ParquetFile) -> int:
    """How many rows are decoded at a time: each may name the largest text that its column could hold."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, _largest_chunk_bytes(file))))
