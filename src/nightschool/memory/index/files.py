"""An index on the disk: arrays that are mapped, and `meta.json`, which says what they are and of what they were made.

It is written beside the one that is there and takes its place as a whole. Whatever is wrong with it, it can be made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nightschool.errors import Conflict, Damaged
from nightschool.memory.index.cells import CellLists
from nightschool.memory.index.columns import Columns, map_array
from nightschool.memory.index.index import MemoryIndex
from nightschool.memory.index.postings import Postings
from nightschool.memory.index.quantiser import Quantiser
from nightschool.memory.index.verification import META, Verification, checksum_of
from nightschool.store.atomic import publish_directory, read_json, write_json

# Raised when the arrays come out otherwise, so that none of an older nightschool is taken.
FORMAT = 1
_QUANTISER = {"codebooks": 3, "mean": 1, "directions": 2, "scales": 1, "planes": 2}
_LISTS = ("order", "cell_starts", "posting_tokens", "posting_starts", "posting_slots")


def save_index(index: MemoryIndex, folder: Path, made_of: dict[str, str]) -> None:
    """Write an index into `folder`, in the place of the one that is there.

    Args:
        index: What is written; its lists are tidied first.
        folder: Where.
        made_of: What it was derived from: the store, the encoder, the tokenizer. `open_index` compares it.

    Raises:
        Locked: If another process is writing the same folder.
        DiskFull: If there is no room; what was there stays.
    """
    with index.still(), publish_directory(folder, replace=True) as partial:
        columns = index.columns
        columns.write(partial)
        for name, array in (index.quantiser.arrays() | _lists_of(index)).items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        meta = {
            "format": FORMAT,
            "made_of": made_of,
            "revision": index.revision,
            "horizon": index.horizon,
            "fitted_on": index.fitted_on,
            "length": columns.length,
            "knowledge_length": index.tokens_per_line,
            "knowledge_dim": 2 * index.quantiser.half,
            "knowledge_num": index.quantiser.size**2,
            "keeps_keys": columns.keys is not None,
            "checksums": _checksums(partial),
        }
        write_json(partial / META, meta)


def open_index(folder: Path, made_of: dict[str, str], *, verify: bool = False) -> MemoryIndex:
    """Map the index of a folder. Nothing but sizes and types is read, unless `verify` asks for every byte.

    Raises:
        NotFound: If there is none.
        Conflict: If it was made of another store, encoder or tokenizer, or by another nightschool.
        Damaged: If it is not whole.
    """
    meta = read_json(folder / META)
    if meta.get("format") != FORMAT:
        raise Conflict(f"{folder} has the format {meta.get('format')}, and this nightschool reads {FORMAT}.")
    if meta.get("made_of") != made_of:
        told: dict[str, Any] = found if isinstance(found := meta.get("made_of"), dict) else {}
        others = [f"{key} {told.get(key)!r}, now {value!r}" for key, value in made_of.items() if told.get(key) != value]
        raise Conflict(f"{folder} was made of something else ({'; '.join(others) or 'more than now'}).")
    try:
        length, width = int(meta["length"]), int(meta["knowledge_dim"])
        columns = Columns.mapped(
            folder, length, int(meta["knowledge_length"]), key_width=width if meta["keeps_keys"] else 0
        )
        fitted = {name: map_array(folder / f"{name}.npy", np.float32, dims) for name, dims in _QUANTISER.items()}
        order, starts, tokens, token_starts, slots = (map_array(folder / f"{name}.npy", np.int32, 1) for name in _LISTS)
        quantiser = Quantiser(**fitted)
        size = quantiser.size
        if size**2 != meta["knowledge_num"] or 2 * quantiser.half != width or len(starts) != size**2 + 1:
            raise Damaged(f"{folder} has codebooks that do not fit its lists.")
        if int(starts[-1]) != len(order) or len(token_starts) != len(tokens) + 1 or int(token_starts[-1]) != len(slots):
            raise Damaged(f"{folder} has lists that are cut.")
        if verify:
            with Verification(folder) as verification:
                if (damaged := verification.damaged()) is not None:
                    raise Damaged(f"{folder / damaged} is not what was written: its checksum differs.")
        revision, horizon, fitted_on = (int(meta[name]) for name in ("revision", "horizon", "fitted_on"))
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{folder / META} lacks something, or holds nonsense ({error}).") from error
    cells = CellLists(size, order, starts)
    postings = Postings(tokens, token_starts, slots)
    return MemoryIndex(quantiser, columns, cells, postings, revision=revision, horizon=horizon, fitted_on=fitted_on)


def _lists_of(index: MemoryIndex) -> dict[str, npt.NDArray[Any]]:
    index.tidy()
    cells, postings = index.cells, index.postings
    arrays = (cells.order, cells.starts, postings.tokens, postings.starts, postings.slots)
    return dict(zip(_LISTS, arrays, strict=True))


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each array's file."""
    found = {}
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as file:
            found[path.name] = checksum_of(file)
    return found
