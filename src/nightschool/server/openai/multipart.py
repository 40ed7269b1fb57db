"""A form with one file in it, parsed as it arrives: the file goes to the disk piece by piece, and nothing else is large."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from nightschool.server.errors import Refusal

_MOST_FIELDS = 8
_MOST_FIELD_BYTES = 4096
_MOST_NAME_CHARACTERS = 200
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class FileForm:
    """Takes the pieces of a body; the bytes of the part `file` go to `sink`, other parts to `fields`.

    Raises:
        Refusal: 400 if the body is no such form.
    """

    def __init__(self, content_type: str, sink: IO[bytes]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise _malformed("the Content-Type is not multipart/form-data with a boundary")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """What its sender calls the file; None until it has come."""
        self._sink = sink
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._take: Callable[[bytes], object] = self._ignore
        self._field, self._content = "", bytearray()
        self._ended = False
        callbacks: Any = {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self._take(data[start:end]),
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the body. Raises Refusal where they are not what a form has there."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def finish(self) -> str:
        """The name of the file, once the body has ended. Raises Refusal if it was cut, or had no file."""
        if not self._ended:
            raise _malformed("it ends before the boundary that closes it")
        if self.filename is None:
            raise Refusal(
                400, "There is no file. Send it as the part `file`.", "missing_required_parameter", param="file"
            )
        return self.filename

    def _part_begin(self) -> None:
        self._disposition = b""
        self._field, self._content = "", bytearray()

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == "file":
            if self.filename is not None:
                raise Refusal(400, "There are two files. Upload each by itself.", "invalid_value", param="file")
            self.filename = shown_name(options.get(b"filename", b"").decode("utf-8", "replace"))
            self._take = self._sink.write
            return
        if len(self.fields) >= _MOST_FIELDS or self._field in self.fields:
            raise _malformed("it has too many fields, or one of them twice")
        self._take = self._collect

    def _part_end(self) -> None:
        if self._field != "file":
            self.fields[self._field] = self._content.decode("utf-8", "replace")
        self._take = self._ignore

    def _end(self) -> None:
        self._ended = True

    def _collect(self, data: bytes) -> None:
        self._content += data
        if len(self._content) > _MOST_FIELD_BYTES:
            raise _malformed(f"the field {self._field[:100]!r} is longer than {_MOST_FIELD_BYTES} bytes")

    def _ignore(self, data: bytes) -> None:
        """What stands outside of parts has no meaning."""


def shown_name(name: str) -> str:
    """What a file is called when it is shown: the last part of a path, printable, and never empty."""
    last = _UNPRINTABLE.sub("�", name.replace("\\", "/")).rpartition("/")[2].strip()
    return last[-_MOST_NAME_CHARACTERS:] or "upload"


def _malformed(why: str) -> Refusal:
    return Refusal(400, f"The body is not a form with a file: {why}. Send multipart/form-data.", "invalid_form")
