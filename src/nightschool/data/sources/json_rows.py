"""JSON values of a file, one at a time and each with its line: arrays, lines, or objects one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nightschool.data.sources.problems import Problems
from nightschool.data.sources.text_input import LINE_LIMIT_BYTES, text_chunks, text_lines, too_long
from nightschool.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16  # a literal or an escape that a chunk's end cuts through is shorter


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the field {twice!r} is there twice in one object")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_no_duplicate_keys)


def parse_json(text: str) -> Any:
    """Decode one JSON value, strictly: no NaN, no field twice.

    Raises:
        ValueError: If it is malformed; `JSONDecodeError` where the place is known.
    """
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text[end:].strip(" \t\r\n"):
        raise json.JSONDecodeError("Extra data after the value", text, end)
    return value


def json_lines(
    path: Path, source: str, problems: Problems, limit_bytes: int = LINE_LIMIT_BYTES
) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` for each line that is not blank. A malformed line is a problem, and reading goes on."""
    for number, line in text_lines(path, source, limit_bytes):
        if not line.strip():
            continue
        try:
            value = parse_json(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            problems.add(
                f"{source}:{number}: malformed JSON at column {error.colno}: {error.msg}. Each line is one JSON object."
            )
        except ValueError as error:
            problems.add(f"{source}:{number}: malformed JSON: {error}. Each line is one JSON object.")
        else:
            yield number, value


def json_array(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line where it begins, element)` of a JSON array, holding one element at a time.

    Raises:
        DataError: At the first malformed place, with its line; what follows it cannot be told apart.
    """
    scanner = _Scanner(path, source)
    scanner.expect("[", "a JSON array begins with [")
    if scanner.peek() != "]":
        yield scanner.value()
        while scanner.peek() == ",":
            scanner.expect(",", "")
            yield scanner.value()
    scanner.expect("]", "after an element comes , or ]")
    if scanner.peek():
        raise scanner.wrong("nothing may follow the ] that ends the array")


def json_stream(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` of JSON values that follow each other with white space between, on any lines.

    Raises:
        DataError: At the first malformed place, with its line.
    """
    scanner = _Scanner(path, source)
    while scanner.peek():
        yield scanner.value()


class _Scanner:
    """A window over the text of a file, which grows to the longest single value and no further."""

    def __init__(self, path: Path, source: str) -> None:
        self.source = source
        self.chunks = text_chunks(path, source)
        self.buffer = ""
        self.position = 0
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            end = _SPACE.match(self.buffer, self.position).end()  # type: ignore[union-attr]
            self._advance(end)
            if end < len(self.buffer):
                return self.buffer[end]
            if not self._grow():
                return ""

    def expect(self, character: str, otherwise: str) -> None:
        if self.peek() != character:
            raise self.wrong(otherwise)
        self._advance(self.position + 1)

    def value(self) -> tuple[int, Any]:
        if not self.peek():
            raise self.wrong("a value is missing")
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - _LONGEST_TOKEN
                if cut and self._grow():
                    continue
                line = self.line + self.buffer.count("\n", self.position, error.pos)
                raise DataError(
                    f"{self.source}:{line}: malformed JSON: {error.msg}. Correct it at this line."
                ) from None
            except RecursionError:
                raise self.wrong("it is nested too deeply") from None
            except ValueError as error:
                raise self.wrong(str(error)) from None
            if end == len(self.buffer) and self._grow():  # a number may go on
                continue
            line = self.line
            self._advance(end)
            return line, value

    def wrong(self, why: str) -> DataError:
        found = self.buffer[self.position : self.position + 1]
        return DataError(
            f"{self.source}:{self.line}: malformed JSON: {why}; found {repr(found) if found else 'the end of the file'}. "
            "Correct it at this line."
        )

    def _advance(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.position, to)
        self.position = to

    def _grow(self) -> bool:
        """Read on until what is pending has doubled, so that a long value is decoded only a few times."""
        pending = self.buffer[self.position :]
        if len(pending) > LINE_LIMIT_BYTES:
            raise too_long(self.source, self.line, "the value that begins here")
        pieces = [pending]
        added = 0
        for chunk in self.chunks:
            pieces.append(chunk)
            added += len(chunk)
            if added > len(pending):
                break
        if added:
            self.buffer = "".join(pieces)
            self.position = 0
        return added > 0
