"""Rows of a data file, whatever its kind: JSON array, JSON Lines, Parquet, CSV or plain text.

The kind is told by the content where it can be (a `.json` that holds JSON Lines is fine), else by the ending.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightschool.data.sources.json_rows import json_array, json_lines, json_stream, parse_json
from nightschool.data.sources.parquet_rows import READ_COLUMNS, parquet_rows
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.text_input import LINE_LIMIT_BYTES, open_data, text_lines, too_long, too_many
from nightschool.errors import DataError, NotFound

Kind = Literal["array", "lines", "stream", "parquet", "csv", "text"]

ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt")
_HEAD_BYTES = 1 << 16
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_NESTED_COLUMNS = ("messages", "conversations", "conversation", "instances", "paraphrases", "alternatives")


@dataclass(frozen=True)
class Row:
    """One row. `line` is the 1-based line where it begins, or the 1-based row of a Parquet file."""

    fields: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def read_rows(
    path: Path,
    *,
    source: str | None = None,
    problems: Problems | None = None,
    most_rows: int | None = None,
    columns: Collection[str] = READ_COLUMNS,
) -> Iterator[Row]:
    """Yield the rows of one file in its order, holding one at a time.

    Args:
        path: The file.
        source: How messages name the file; by default as the path is written.
        problems: Where malformed rows are noted while reading goes on. By default the first one raises.
        most_rows: Refuse a file with more; at once where the file says how many it has.
        columns: What is read of a file that is kept in columns.

    Raises:
        NotFound: If there is no such file.
        DataError: If it is empty, malformed, binary, no UTF-8, or of an unknown kind.
    """
    source = str(path) if source is None else source
    problems = Problems(limit=1) if problems is None else problems
    noted = len(problems.found)
    count = 0
    try:
        for line, fields in _values(kind_of(path, source), path, source, problems, most_rows, columns):
            count += 1
            if most_rows is not None and count > most_rows:
                raise too_many(source, "more rows", most_rows)
            if isinstance(fields, dict):
                yield Row(fields, source, line)
            else:
                problems.add(
                    f"{source}:{line}: a row is a JSON object, but this one is {_json_name(fields)}. Write {{…}}."
                )
        if count == 0 and len(problems.found) == noted:
            problems.add(f"{source}: the file holds no rows. Add some, or leave it out.")
    except DataError as error:
        if problems.raised:
            raise
        problems.add(str(error))


def expand(pattern: str, root: Path, key: str) -> list[Path]:
    """The files that a recipe's path names: a file, a folder (all data files below it) or a glob; sorted.

    Args:
        pattern: As the user wrote it; relative to `root`.
        root: Where relative paths begin.
        key: The dotted key of the recipe, for messages.

    Raises:
        NotFound: If nothing is there.
    """
    path = root / Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in ENDINGS and not _hidden(p, path)
        )
        if not found:
            raise NotFound(f"{key}: the folder {pattern} holds no data file ({', '.join(ENDINGS)}). Put one there.")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(pattern):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())  # noqa: PTH207 - an absolute pattern
        if found:
            return found
        raise NotFound(f"{key}: no file matches {pattern} in {root}. Correct the pattern, or create the file.")
    raise NotFound(f"{key}: there is no file {pattern} in {root}. Correct the path, or create the file.")


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def kind_of(path: Path, source: str) -> Kind:
    """Tell how a file is read, by its first bytes and its ending.

    Raises:
        NotFound: If there is no such file.
        DataError: If it is empty, packed, or of no known kind.
    """
    with open_data(path) as file:
        try:
            head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise DataError(f"{source}: the file cannot be read: {error.strerror}. Check the disk.") from None
    ending = path.suffix.lower()
    if not head:
        raise DataError(f"{source}: the file is empty. Fill it, or leave it out.")
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{source}: the file is packed with {name}. Unpack it first.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source}:1: the file is UTF-16. Save it as UTF-8 text.")
    if ending == ".parquet":
        raise DataError(f"{source}: the file does not begin with PAR1, so it is no Parquet file. Write it again.")
    if ending in {".txt", ".md"}:
        return "text"
    if ending in {".csv", ".tsv"}:
        return "csv"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return "array"
    if first == b"{":
        return _lines_or_stream(path, source, ending)
    if ending in {".json", ".jsonl", ".ndjson"}:
        return "lines"
    raise DataError(
        f"{source}: neither the content nor the ending {ending or '(none)'} says what this is. "
        f"Known are {', '.join(ENDINGS)}."
    )


def _lines_or_stream(path: Path, source: str, ending: str) -> Kind:
    if ending in {".jsonl", ".ndjson"}:
        return "lines"
    first = next(line for _, line in text_lines(path, source) if line.strip())
    try:
        parse_json(first)
    except ValueError:
        return "stream"
    return "lines"


def _values(
    kind: Kind, path: Path, source: str, problems: Problems, most_rows: int | None, columns: Collection[str]
) -> Iterator[tuple[int, Any]]:
    match kind:
        case "array":
            return json_array(path, source)
        case "lines":
            return json_lines(path, source, problems)
        case "stream":
            return json_stream(path, source)
        case "parquet":
            return parquet_rows(path, source, most_rows, columns)
        case "csv":
            return _csv_rows(path, source, problems)
        case "text":
            return _text_document(path, source)


def _csv_rows(path: Path, source: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT_BYTES))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line for _, line in text_lines(path, source)), delimiter=delimiter, strict=True)
    header: list[str] = []
    end = 0
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise DataError(
                        f"{source}:{line}: the first line names the columns, but a name is empty or there twice: {', '.join(header)}. Correct it."
                    )
            elif len(cells) != len(header):
                problems.add(
                    f"{source}:{line}: the row has {len(cells)} cells, but there are {len(header)} columns. Quote cells that hold {delimiter!r}."
                )
            else:
                yield (
                    line,
                    {
                        name: cell
                        for name, cell in _nested(dict(zip(header, cells, strict=True)), f"{source}:{line}", problems)
                        if cell != ""
                    },
                )
    except csv.Error as error:
        raise DataError(
            f'{source}:{reader.line_num}: malformed CSV: {error}. Quote the cell with " and double the quotes in it.'
        ) from None


def _nested(fields: dict[str, str], where: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Columns that hold lists are written as JSON in a cell."""
    for name, cell in fields.items():
        if name in _NESTED_COLUMNS and cell.strip():
            try:
                yield name, parse_json(cell)
            except ValueError as error:
                problems.add(
                    f"{where}: the column '{name}' holds JSON, and this cell is malformed: {error}. Correct it."
                )
        else:
            yield name, cell


def _text_document(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    lines: list[str] = []
    size = 0
    for number, line in text_lines(path, source):
        size += len(line)
        if size > LINE_LIMIT_BYTES:
            raise too_long(source, number, "the text, which is one document,")
        lines.append(line)
    text = "".join(lines).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "a string", list: "an array"}
    return names.get(type(value), "a number")
