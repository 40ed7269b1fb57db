"""The safetensors format, byte by byte, so that a file can be written as a stream without holding it twice.

A file is eight bytes with the length of its header, the header (JSON: dtype, shape and place of every tensor), and the
bytes of the tensors without gaps. See https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Large files are cut, so that a broken transfer sends at most this much again.
FILE_LIMIT_BYTES = 1 << 30
# The header is padded so that tensors begin at a multiple of this, in the file and in shared memory.
ALIGNMENT_BYTES = 64

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the format names it, with a `dtype` such as `F32` or `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorFile:
    """One file to be: its header, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


def plan_files(stem: str, tensors: Iterable[TensorInfo], *, limit_bytes: int = FILE_LIMIT_BYTES) -> list[TensorFile]:
    """Distribute tensors over files of at most about `limit_bytes`, named by `part_name`.

    A tensor larger than the limit has a file of its own. The plan depends on the tensors only, so that the same state
    makes the same files.
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if groups[-1] and filled + tensor.size_bytes > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size_bytes
    names = [part_name(stem, index, len(groups)) for index in range(len(groups))]
    return [_file(name, group) for name, group in zip(names, groups, strict=True)]


def part_name(stem: str, index: int, num_parts: int) -> str:
    """The name of part `index` (from 0) of a group of tensors."""
    return f"{stem}.safetensors" if num_parts == 1 else f"{stem}-{index + 1:05d}-of-{num_parts:05d}.safetensors"


def index_name(stem: str) -> str:
    """The file that says which part holds which tensor, where there are several."""
    return f"{stem}.safetensors.index.json"


def index_of(files: Sequence[TensorFile]) -> str:
    """The content of the index: the same that Hugging Face libraries write and read."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.size_bytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)


def _file(name: str, tensors: list[TensorInfo]) -> TensorFile:
    # Wide types first: then every tensor begins at a multiple of its own item, without gaps, which the format forbids.
    ordered = tuple(sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name)))
    content: dict[str, object] = {}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.size_bytes
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return TensorFile(name, len(text).to_bytes(8, "little") + text, ordered)
