"""What a GGUF file says of itself, read within bounds before any library touches it.

A file of this kind is foreign data: its header may state sizes that no memory holds, or tensors that lie behind its end.
Libraries believe it. The layout is that of the GGUF specification, versions 2 and 3, little-endian:
magic, version, counts, keys with values, table of tensors, padding, tensors.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nightschool.errors import Damaged, ModelError, NotFound
from nightschool.models.folder import TensorFact

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

# Far above what models have: vocabularies of 262,144 with 514,906 merges, 1,100 tensors, templates of 30 kB.
_MAX_KEYS = 4096
_MAX_TENSORS = 65_536
_MAX_STRING_BYTES = 1 << 20
_MAX_ELEMENTS = 2_000_000
_MAX_HEADER_BYTES = 256 << 20
_MAX_DIMENSIONS = 4
_MAX_SIZE = 1 << 24
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """Facts of one file. `metadata` leaves arrays out; `tensors` have torch's order of dimensions."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[TensorFact, ...]

    @property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)


def read_header(path: Path, block_sizes: dict[int, tuple[str, int, int]]) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Args:
        path: The file.
        block_sizes: Of every tensor type: its name, elements of a block, bytes of a block.

    Raises:
        NotFound: If there is no such file.
        ModelError: If it is no GGUF file, one of several parts, or of a kind that cannot be read.
        Damaged: If it is cut, or its header states what cannot be.
    """
    if not path.is_file():
        raise NotFound(f"The base {str(path)!r} is not there: no such file. Check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file, path)
        _check_magic(cursor, path)
        tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
        cursor.bound("tensors", tensor_count, _MAX_TENSORS)
        cursor.bound("keys", key_count, _MAX_KEYS)
        metadata = _read_metadata(cursor, key_count)
        _check_metadata(metadata, path, tensor_count)
        entries = [_read_entry(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise cursor.damaged(f"an alignment of {alignment}")
        start = -(-file.tell() // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in entries:
        if kind not in block_sizes:
            raise ModelError(
                f"The tensor {name!r} of {path} has the type {kind}, which this gguf package does not know. "
                "Update the package gguf, or take another quantisation of the model."
            )
        label, block_elements, block_bytes = block_sizes[kind]
        tensor = TensorFact(name, shape, path.name, label)
        if not shape or shape[-1] % block_elements or max(shape) > _MAX_SIZE * 64:
            raise cursor.damaged(f"the shape {list(shape)} for the tensor {name!r} of type {label}")
        end = start + offset + tensor.num_elements // block_elements * block_bytes
        if end > size:
            raise Damaged(
                f"{path} is cut: its tensor {name!r} ends at byte {end:,}, and the file has {size:,}. Fetch it again."
            )
        tensors.append(tensor)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise cursor.damaged("two tensors of one name")
    return GgufHeader(path, metadata["general.architecture"], metadata, tuple(tensors))


def _check_magic(cursor: _Cursor, path: Path) -> None:
    if cursor.take(4) != _MAGIC:
        raise ModelError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}. Fetch it again.")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        why = "is written for big-endian machines" if version > 1 << 16 else f"has version {version} of the format"
        raise ModelError(f"{path} {why}; versions 2 and 3, little-endian, can be read. Take another file of the model.")


def _check_metadata(metadata: dict[str, Any], path: Path, tensor_count: int) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelError(f"{path} names no architecture (general.architecture). It holds no language model.")
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model. Put them together with `llama-gguf-split --merge` and name the result."
        )
    layers = metadata.get(f"{architecture}.block_count", 0)
    # A model of this many layers is built before its tensors are looked for.
    if layers > tensor_count:
        raise Damaged(f"{path} states {layers:,} layers and holds {tensor_count:,} tensors. Fetch it again.")
    for key, value in metadata.items():
        if key.startswith(f"{architecture}.") and isinstance(value, int) and not 0 <= value <= _MAX_SIZE:
            raise Damaged(f"{path} states {key} = {value:,}, which no model has. Fetch it again.")


def _read_metadata(cursor: _Cursor, key_count: int) -> dict[str, Any]:
    metadata = {}
    for _ in range(key_count):
        key = cursor.text()
        value = _read_value(cursor, cursor.number("<I"))
        if value is not None:
            metadata[key] = value
    return metadata


def _read_value(cursor: _Cursor, kind: int) -> Any:
    """One value; None for an array, which is only passed over."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise cursor.damaged(f"a value of type {kind}")
    inner, count = cursor.number("<I"), cursor.number("<Q")
    cursor.elements += count
    cursor.bound("elements in its arrays", cursor.elements, _MAX_ELEMENTS)
    if inner in _SCALARS:
        cursor.take(count * struct.calcsize(_SCALARS[inner]))
    elif inner == _STRING:
        for _ in range(count):
            cursor.take(cursor.length())
    else:
        raise cursor.damaged(f"an array of type {inner}")
    return None


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    dimensions = cursor.number("<I")
    cursor.bound(f"dimensions of the tensor {name!r}", dimensions, _MAX_DIMENSIONS)
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


class _Cursor:
    """Reads forward through a header, and never more than the bounds allow."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.elements = 0

    def take(self, count: int) -> bytes:
        if self._file.tell() + count > _MAX_HEADER_BYTES:
            raise self.damaged(f"more than {_MAX_HEADER_BYTES >> 20} MiB")
        content = self._file.read(count)
        if len(content) < count:
            raise Damaged(f"{self._path} is cut: it ends within its header. Fetch it again.")
        return content

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        if isinstance(value, float) and not math.isfinite(value):
            raise self.damaged(f"the number {value}")
        return value

    def length(self) -> int:
        length: int = self.number("<Q")
        self.bound("bytes in one text", length, _MAX_STRING_BYTES)
        return length

    def text(self) -> str:
        try:
            return self.take(self.length()).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text that is no UTF-8") from None

    def bound(self, what: str, value: int, most: int) -> None:
        if value > most:
            raise self.damaged(f"{value:,} {what}, where at most {most:,} are believed")

    def damaged(self, what: str) -> Damaged:
        return Damaged(f"The header of {self._path} states {what}. The file is broken; fetch it again.")
