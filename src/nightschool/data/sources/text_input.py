"""Bytes of a file → text, with the line of the first bad byte and a bound on what is held in memory."""

from __future__ import annotations

import codecs
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nightschool.errors import DataError, NotFound
from nightschool.units import format_bytes

LINE_LIMIT_BYTES = 64_000_000
"""Longest line, JSON value or plain text document that is accepted."""

CHUNK_BYTES = 1 << 20
_BOM = codecs.BOM_UTF8


def open_data(path: Path) -> IO[bytes]:
    """Open a data file for reading.

    Raises:
        NotFound: If there is no such file.
        DataError: If it is no regular file (opening a pipe would wait for whoever writes it), or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "no regular file, but a pipe, a socket or a device"
            raise DataError(f"{path} is {kind}. Name a file; copy what comes from elsewhere into one.")
        return path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}. Correct the path, or create the file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its kind and its permissions.") from None


def too_long(source: str, line: int, what: str, limit_bytes: int = LINE_LIMIT_BYTES) -> DataError:
    """The error for a value above a limit."""
    return DataError(
        f"{source}:{line}: {what} is longer than the limit of {format_bytes(limit_bytes)}. Split it into shorter ones."
    )


def too_many(source: str, has: str, most_rows: int) -> DataError:
    """The error for a file with more rows than examples may be held in memory."""
    return DataError(
        f"{source}: the file has {has}, and {most_rows:,} are read at most, because examples are held in memory. "
        "Take a part of it; to pretrain on all of it, use nightschool data tokenize."
    )


def text_lines(path: Path, source: str, limit_bytes: int = LINE_LIMIT_BYTES) -> Iterator[tuple[int, str]]:
    """Yield `(line number, line)`, line ends kept, of a UTF-8 file; a byte order mark is dropped.

    Raises:
        DataError: At a line that is too long (it is not read to its end), no UTF-8, or binary.
    """
    with open_data(path) as file:
        number = 0
        while raw := file.readline(limit_bytes + 1):
            number += 1
            if len(raw) > limit_bytes:
                raise too_long(source, number, "the line", limit_bytes)
            if number == 1 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, number, error) from None
            if "\0" in line:
                raise _binary(source, number)
            yield number, line


def text_chunks(path: Path, source: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces of at most `CHUNK_BYTES`, whatever its lines are.

    Raises:
        DataError: At the first byte that is no UTF-8, or at a zero byte, with the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    line = 1
    with open_data(path) as file:
        while True:
            raw = file.read(CHUNK_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(source, line + error.object[: error.start].count(b"\n"), error) from None
            if "\0" in text:
                raise _binary(source, line + text[: text.index("\0")].count("\n"))
            line += text.count("\n")
            if text:
                yield text
            if not raw:
                return


def _not_utf8(source: str, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{source}:{line}: the byte 0x{byte:02x} is no UTF-8. Save the file as UTF-8 text.")


def _binary(source: str, line: int) -> DataError:
    return DataError(f"{source}:{line}: a zero byte, so this is not text but binary data. Give a text file.")
