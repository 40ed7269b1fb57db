"""Where each tensor of a safetensors file lies, from its header alone (see `tensorfile`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nightschool.checkpoint_writer.tensorfile import ITEM_BYTES

_LARGEST_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's bytes, from `begin` up to `end` in its file, and what they are: a `dtype` such as `F32`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Read the header.

    Raises:
        ValueError: If the file is none of the format, or cut.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LARGEST_HEADER_BYTES:
            raise ValueError(f"its header would have {length} bytes")
        try:
            header = json.loads(file.read(length))
            places = {str(name): _place(fact, 8 + length) for name, fact in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header does not describe tensors ({error!r})") from error
        size = path.stat().st_size
    for name, place in places.items():
        if place.end > size:
            raise ValueError(f"it is cut: {name!r} would end at byte {place.end:,}, and the file has {size:,}")
    return places


def _place(fact: dict[str, object], offset: int) -> TensorPlace:
    dtype, shape, offsets = fact["dtype"], fact["shape"], fact["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError(f"{fact} is no tensor")
    begin, end = (offset + int(one) for one in offsets)
    sizes = tuple(int(one) for one in shape)
    if not offset <= begin <= end or (dtype in ITEM_BYTES and end - begin != prod(sizes) * ITEM_BYTES[dtype]):
        raise ValueError(f"{fact} has other bytes than its shape")
    return TensorPlace(dtype, sizes, begin, end)
