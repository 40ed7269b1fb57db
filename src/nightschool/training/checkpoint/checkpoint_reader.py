"""The tensors of a checkpoint as they lie in its files.

A group (`model`, `optimizer`, `rng`) is one safetensors file, or several with an index. Where processes share the tensors
among them, each writes what it holds as a group of its own (`model-rank0`, `model-rank1`, …): a tensor then is the
concatenation of its parts along dimension 0 in the order of ranks. So it loads on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nightschool.checkpoint_writer.tensorfile import index_name
from nightschool.errors import Damaged, StateMismatch
from nightschool.store.atomic import read_json
from nightschool.training.checkpoint.contents import DTYPE_CODES

# The weights were called otherwise in format 1; everything else is the same.
_MODEL_STEMS = ("model", "weights")
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a group by name. Each is read when it is asked for, so that no more than one needs memory at a time."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        """`files` are in the order of ranks.

        Raises:
            Damaged: If one of them is not a whole safetensors file.
        """
        self._folder = folder
        self._parts: dict[str, list[tuple[str, Any]]] = {}
        for file in files:
            try:
                opened: Any = safe_open(folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _unreadable(folder / file, error) from error
            for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                self._parts.setdefault(name, []).append((file, opened))

    def __getitem__(self, name: str) -> Tensor:
        parts = []
        for file, opened in self._parts[name]:
            try:
                parts.append(opened.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise _unreadable(self._folder / file, error) from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor row by row along its first dimension, so that the whole never needs memory."""
        for file, opened in self._parts[name]:
            try:
                part = opened.get_slice(name)
                for place in range(part.get_shape()[0]):
                    yield part[place]
            except (SafetensorError, OSError) as error:
                raise _unreadable(self._folder / file, error) from error

    def without(self, names: Set[str]) -> StoredTensors:
        """The same tensors but these."""
        rest = StoredTensors(self._folder, [])
        rest._parts = {name: parts for name, parts in self._parts.items() if name not in names}
        return rest

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def described(self) -> dict[str, Tensor]:
        """The shape and dtype of each, without its bytes."""
        return {name: self._describe(name) for name in self._parts}

    def _describe(self, name: str) -> Tensor:
        slices = [opened.get_slice(name) for _, opened in self._parts[name]]
        shape = list(slices[0].get_shape())
        if len(slices) > 1:
            shape[0] = sum(part.get_shape()[0] for part in slices)
        return torch.empty(shape, dtype=_DTYPES[slices[0].get_dtype()], device="meta")


def rank_group(stem: str, rank: int) -> str:
    """The group in which a process saves its part of another group."""
    return f"{stem}-rank{rank}"


def open_group(folder: Path, stem: str) -> StoredTensors:
    """The tensors of a group, in however many files they lie; none if it is not there.

    Raises:
        Damaged: If a file cannot be read, or an index names one outside the folder.
    """
    return StoredTensors(folder, group_files(folder, stem))


def load_group(folder: Path, stem: str) -> dict[str, Tensor]:
    """As `open_group`, but all of them in memory."""
    return dict(open_group(folder, stem))


def group_files(folder: Path, stem: str) -> list[str]:
    """The files in which a group of tensors lies; none if it is not there.

    Raises:
        Damaged: If an index names a file outside the folder.
    """
    for name in _MODEL_STEMS if stem == "model" else (stem,):
        if found := _whole_files(folder, name):
            return found
    of_ranks = (_whole_files(folder, rank_group(stem, rank)) for rank in count())
    return [name for files in takewhile(bool, of_ranks) for name in files]


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise Damaged(f"{index} names no file for each tensor under weight_map. Resume from another checkpoint.")
    return content


def _whole_files(folder: Path, stem: str) -> list[str]:
    if (folder / f"{stem}.safetensors").is_file():
        return [f"{stem}.safetensors"]
    index = folder / index_name(stem)
    if not index.is_file():
        return []
    names = sorted(set(_weight_map(index).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise Damaged(
            f"{index.name} of {folder.name} names the file {outside[0]!r}, which lies elsewhere. "
            "Resume from another checkpoint."
        )
    return names


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(f"{path.name} of {path.parent.name} cannot be read: {error}. Resume from another checkpoint.")


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str, more: bool = False
) -> None:
    """Compare two sets of named tensors by name, shape and dtype; stored ones are not read. With `more`, others may be there.

    Raises:
        StateMismatch: Naming the tensors that are missing, unexpected, or of another shape or dtype.
    """
    found = found.described() if isinstance(found, StoredTensors) else found
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", set() if more else found.keys() - expected.keys()),
        )
        if names
    ]
    for name in sorted(expected.keys() & found.keys()):
        mine, theirs = expected[name], found[name]
        if mine.shape != theirs.shape:
            problems.append(f"{name} has the shape {list(theirs.shape)}, and the model wants {list(mine.shape)}")
        elif mine.dtype != theirs.dtype:
            problems.append(f"{name} is {theirs.dtype}, and the model wants {mine.dtype}")
    if problems:
        raise StateMismatch(
            f"The {what} does not fit this run: {'; '.join(problems[:8])}. "
            "Resume with the recipe that the checkpoint was saved with, or from another checkpoint."
        )
