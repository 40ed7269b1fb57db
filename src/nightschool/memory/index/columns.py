"""The arrays of an index, one line for each row of a memory, in slots that follow the order of the rows.

They are mapped from their files, private to the process: nothing is read before it is needed, and nothing that is written here
reaches a file. There is room behind the last line for what comes; when that is full, arrays move into new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nightschool.errors import Damaged
from nightschool.memory.index.quantiser import CODE_BYTES, HASH_BITS

Slots = npt.NDArray[np.int32]
# Room for what comes: an eighth of what there is, and so much at least.
_LEAST_ROOM = 1024


@dataclass
class Columns:
    """Arrays with room for `capacity` slots, of which `length` are in use.

    `rows` are the store's numbers, ascending; `born` and `died` revisions, where 0 is "lives"; `tokens` [·, L]; `lengths` the
    tokens of the whole entry, which may be more than L; `spans` [·, 2] where subject and relation end among the tokens; `cells`,
    `codes`, `hashes` [4, ·] what the quantiser says; `keys` [·, 2·half] the addresses in half precision, or none.
    """

    length: int
    rows: npt.NDArray[np.uint32]
    born: npt.NDArray[np.uint32]
    died: npt.NDArray[np.uint32]
    tokens: Slots
    lengths: npt.NDArray[np.uint16]
    spans: npt.NDArray[np.uint8]
    cells: Slots
    codes: npt.NDArray[np.int8]
    hashes: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.float16] | None

    @classmethod
    def empty(cls, tokens_per_line: int, *, key_width: int = 0) -> Columns:
        """No lines yet. `key_width`: the numbers of an address that are kept; 0 keeps none."""
        forms = _forms(tokens_per_line, key_width)
        arrays: dict[str, Any] = {name: _array(form, _LEAST_ROOM) for name, form in forms.items()}
        return cls(0, **{"keys": None, **arrays})

    @property
    def capacity(self) -> int:
        return len(self.rows)

    def slot_of(self, row: int) -> int:
        """The slot of a row, -1 if the index has none."""
        used = self.rows[: self.length]
        # Of the rows' own type: any other would have searchsorted copy all of them.
        place = int(used.searchsorted(np.uint32(row))) if 0 <= row < 1 << 32 else self.length
        return place if place < self.length and used[place] == row else -1

    def is_visible(self, slots: Slots, revision: int | None) -> npt.NDArray[np.bool_]:
        """Which of `slots` a reader of `revision` sees; None is the newest."""
        died = self.died[slots]
        visible: npt.NDArray[np.bool_] = died == 0
        if revision is not None:
            visible = (self.born[slots] <= revision) & (visible | (died > revision))
        return visible

    def reserve(self, more: int) -> None:
        """Make room for so many lines more."""
        needed = self.length + more
        if needed <= self.capacity:
            return
        room = needed + max(needed // 8, _LEAST_ROOM)
        for name, array in self._arrays():
            axis = _slot_axis(name)
            shape = list(array.shape)
            shape[axis] = room
            grown = np.zeros(shape, array.dtype)
            used = (slice(None),) * axis + (slice(self.length),)
            grown[used] = array[used]
            setattr(self, name, grown)

    def taken(self, slots: Slots) -> Columns:
        """Only these slots, ascending, with room behind them."""
        parts: dict[str, Any] = {}
        for name, array in self._arrays():
            axis = _slot_axis(name)
            shape = list(array.shape)
            shape[axis] = len(slots) + max(len(slots) // 8, _LEAST_ROOM)
            part = np.zeros(shape, array.dtype)
            part[(slice(None),) * axis + (slice(len(slots)),)] = np.take(array, slots, axis=axis)
            parts[name] = part
        return Columns(len(slots), **{"keys": None, **parts})

    def write(self, folder: Path) -> None:
        """Write every array with its room, which takes no place on the disk."""
        for name, array in self._arrays():
            axis = _slot_axis(name)
            shape = list(array.shape)
            shape[axis] = self.length + max(self.length // 8, _LEAST_ROOM)
            target = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, tuple(shape))
            used = (slice(None),) * axis + (slice(self.length),)
            target[used] = array[used]
            target.flush()

    @classmethod
    def mapped(cls, folder: Path, length: int, tokens_per_line: int, *, key_width: int) -> Columns:
        """The arrays of a folder.

        Raises:
            Damaged: If one is missing, or is not what it should be.
        """
        arrays: dict[str, Any] = {"keys": None}
        for name, (dtype, widths) in _forms(tokens_per_line, key_width).items():
            array = map_array(folder / f"{name}.npy", dtype, 1 + len(widths))
            axis = _slot_axis(name)
            others = array.shape[:axis] + array.shape[axis + 1 :]
            if others != widths or array.shape[axis] < length:
                raise Damaged(f"{folder / name}.npy has the shape {list(array.shape)}, too small for {length} entries.")
            arrays[name] = array
        return cls(length, **arrays)

    @property
    def used_bytes(self) -> int:
        """Bytes of the lines in use."""
        return sum(array.nbytes // array.shape[_slot_axis(name)] * self.length for name, array in self._arrays())

    def _arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name in _forms(1, 1):
            array = getattr(self, name)
            if array is not None:
                yield name, array


def map_array(path: Path, dtype: type, dimensions: int) -> npt.NDArray[Any]:
    """Map an array of a file, private to this process.

    Raises:
        Damaged: If there is no such array.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Damaged(f"{path} cannot be read as an array ({error}).") from error
    if array.dtype != dtype or array.ndim != dimensions:
        raise Damaged(f"{path} holds {array.dtype} in {array.ndim} dimensions, not {np.dtype(dtype)} in {dimensions}.")
    return array.view(np.ndarray)


def _forms(tokens_per_line: int, key_width: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Of each column: the type of its numbers, and its other dimensions."""
    forms: dict[str, tuple[type, tuple[int, ...]]] = {
        "rows": (np.uint32, ()),
        "born": (np.uint32, ()),
        "died": (np.uint32, ()),
        "tokens": (np.int32, (tokens_per_line,)),
        "lengths": (np.uint16, ()),
        "spans": (np.uint8, (2,)),
        "cells": (np.int32, ()),
        "codes": (np.int8, (CODE_BYTES,)),
        "hashes": (np.uint64, (HASH_BITS // 64,)),
    }
    return forms | ({"keys": (np.float16, (key_width,))} if key_width else {})


def _slot_axis(name: str) -> int:
    """The bits lie word by word, so that a look at all of them reads on."""
    return 1 if name == "hashes" else 0


def _array(form: tuple[type, tuple[int, ...]], room: int) -> npt.NDArray[Any]:
    dtype, widths = form
    return np.zeros((*widths, room) if widths == (HASH_BITS // 64,) and dtype is np.uint64 else (room, *widths), dtype)
